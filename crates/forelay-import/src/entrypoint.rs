//! The command that runs a package's service in the foreground.
//!
//! Owns what a systemd unit says about it, turned into a start script (user, runtime
//! directories, environment, `ExecStart`), and a short list of services whose units put
//! themselves into the background. Refuses to guess: a unit that cannot be translated
//! gives no entrypoint, and the reason becomes a note.

/// How to start a service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Start {
    /// A command line.
    Command(Vec<String>),
    /// A shell script to be put into the component.
    Script(String),
    /// Nothing; why, in words.
    Unknown(String),
}

const POSTGRESQL: &str = r#"#!/bin/sh
# Made by Forelay: starts PostgreSQL in the foreground, making a cluster first if there is none.
set -eu
version=$(ls /usr/lib/postgresql | sort -V | tail -n 1)
install -d -o postgres -g postgres -m 2775 /run/postgresql
if [ ! -e "/etc/postgresql/$version/main/postgresql.conf" ]; then
    pg_createcluster --start-conf=manual "$version" main
fi
cd /var/lib/postgresql
exec setpriv --reuid=postgres --regid=postgres --init-groups -- \
    "/usr/lib/postgresql/$version/bin/postgres" \
    -D "/var/lib/postgresql/$version/main" \
    -c "config_file=/etc/postgresql/$version/main/postgresql.conf" "$@"
"#;

/// Services whose units fork, by the package that has the unit.
pub fn known_start(package: &str) -> Option<Start> {
    let words = |words: &[&str]| {
        let words = words.iter().map(|word| (*word).to_owned());
        Some(Start::Command(words.collect()))
    };
    match package {
        "nginx" | "nginx-core" | "nginx-light" | "nginx-full" | "nginx-extras" => {
            words(&["/usr/sbin/nginx", "-g", "daemon off;"])
        }
        "apache2" => words(&["/usr/sbin/apache2ctl", "-D", "FOREGROUND"]),
        _ if package == "postgresql" || is_postgresql_server(package) => {
            Some(Start::Script(POSTGRESQL.to_owned()))
        }
        _ => None,
    }
}

fn is_postgresql_server(package: &str) -> bool {
    let version = package.strip_prefix("postgresql-").unwrap_or("x");
    version.bytes().all(|byte| byte.is_ascii_digit())
}

/// Reads the text of a `.service` file.
pub fn from_unit(unit: &str) -> Start {
    let service = Service::parse(unit);
    let kind = service.last("Type").unwrap_or("simple");
    if kind == "forking" {
        return Start::Unknown("its systemd unit forks into the background".to_owned());
    }
    let Some(command) = service.last("ExecStart") else {
        return Start::Unknown("its systemd unit has no ExecStart".to_owned());
    };
    // `-`, `@`, `:`, `+`, `!` change how systemd treats the result.
    let command = command.trim_start_matches(['-', '@', ':', '+', '!']);
    if command.contains('%') {
        return Start::Unknown("its systemd unit is a template".to_owned());
    }
    let user = service.last("User").filter(|user| *user != "root");
    let directories = service.words("RuntimeDirectory");
    let plain = user.is_none()
        && directories.is_empty()
        && service.words("StateDirectory").is_empty()
        && service.all("EnvironmentFile").next().is_none()
        && service.all("Environment").next().is_none()
        && !command.contains(['$', '"', '\'', '\\', ';', '&', '|', '<', '>', '*', '(', '`']);
    if plain {
        let words = command.split_whitespace().map(str::to_owned);
        return Start::Command(words.collect());
    }
    Start::Script(script(&service, user, command))
}

fn script(service: &Service<'_>, user: Option<&str>, command: &str) -> String {
    let mut text = String::from(
        "#!/bin/sh\n# Made by Forelay from the package's systemd unit: starts the service in the \
         foreground.\nset -eu\n",
    );
    let group = service.last("Group").or(user);
    let owner = user.map_or(String::new(), |user| {
        format!("-o {user} -g {} ", group.unwrap_or(user))
    });
    for (setting, place, mode_setting) in [
        ("RuntimeDirectory", "/run", "RuntimeDirectoryMode"),
        ("StateDirectory", "/var/lib", "StateDirectoryMode"),
        ("CacheDirectory", "/var/cache", "CacheDirectoryMode"),
        ("LogsDirectory", "/var/log", "LogsDirectoryMode"),
    ] {
        let mode = service.last(mode_setting).unwrap_or("0755");
        for name in service.words(setting) {
            text.push_str(&format!("install -d {owner}-m {mode} {place}/{name}\n"));
        }
    }
    for setting in service.all("Environment") {
        text.push_str(&format!("export {setting}\n"));
    }
    let files: Vec<&str> = service.all("EnvironmentFile").collect();
    if !files.is_empty() {
        text.push_str("set -a\n");
        for file in files {
            let file = file.trim_start_matches('-');
            text.push_str(&format!("if [ -r {file} ]; then . {file}; fi\n"));
        }
        text.push_str("set +a\n");
    }
    // systemd replaces an unset variable by nothing.
    text.push_str("set +u\n");
    if let Some(directory) = service.last("WorkingDirectory") {
        let directory = directory.trim_start_matches('-');
        text.push_str(&format!("cd {directory}\n"));
    }
    let switch = user.map_or(String::new(), |user| {
        let group = group.unwrap_or(user);
        format!("setpriv --reuid={user} --regid={group} --init-groups -- ")
    });
    // Arguments of the entrypoint are added, so that a manifest can append options.
    text.push_str(&format!("exec {switch}{command} \"$@\"\n"));
    text
}

/// The settings of a unit's `[Service]` section, in order.
struct Service<'a> {
    settings: Vec<(&'a str, String)>,
}

impl<'a> Service<'a> {
    fn parse(unit: &'a str) -> Self {
        let mut settings: Vec<(&str, String)> = Vec::new();
        let mut section = "";
        let mut continued = false;
        for line in unit.lines() {
            let line = line.trim();
            if continued && let Some((_, value)) = settings.last_mut() {
                value.push(' ');
                value.push_str(line.trim_end_matches('\\').trim());
                continued = line.ends_with('\\');
            } else if line.starts_with('[') {
                section = line.trim_matches(['[', ']']);
            } else if section == "Service"
                && !line.starts_with(['#', ';'])
                && let Some((name, value)) = line.split_once('=')
            {
                let text = value.trim_end_matches('\\').trim().to_owned();
                settings.push((name.trim(), text));
                continued = line.ends_with('\\');
            }
        }
        Self { settings }
    }

    fn all<'s>(&'s self, name: &'s str) -> impl Iterator<Item = &'s str> {
        let matching = self
            .settings
            .iter()
            .filter(move |(known, _)| *known == name);
        matching
            .map(|(_, value)| value.as_str())
            .filter(|value| !value.is_empty())
    }

    fn last(&self, name: &str) -> Option<&str> {
        let matching = self.settings.iter().filter(|(known, _)| *known == name);
        let value = matching.map(|(_, value)| value.as_str()).next_back();
        value.filter(|value| !value.is_empty())
    }

    fn words(&self, name: &str) -> Vec<String> {
        let values = self.all(name).flat_map(str::split_whitespace);
        values.map(str::to_owned).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plain_unit_gives_its_command() {
        let unit =
            "[Unit]\nDescription=x\n[Service]\nType=simple\nExecStart=-/usr/sbin/cron -f \\\n -P\n";
        let words = ["/usr/sbin/cron", "-f", "-P"].map(str::to_owned);
        assert_eq!(from_unit(unit), Start::Command(words.to_vec()));
    }

    #[test]
    fn user_directories_and_environment_go_into_a_script() {
        let unit = "[Service]\nType=notify\nUser=redis\nGroup=redis\nRuntimeDirectory=redis\n\
                    RuntimeDirectoryMode=2755\nEnvironmentFile=-/etc/default/redis\n\
                    ExecStart=/usr/bin/redis-server /etc/redis/redis.conf $OPTS\n\
                    [Install]\nAlias=redis.service\n";
        let Start::Script(text) = from_unit(unit) else {
            panic!("no script");
        };
        assert!(text.contains("install -d -o redis -g redis -m 2755 /run/redis\n"));
        assert!(text.contains("if [ -r /etc/default/redis ]; then . /etc/default/redis; fi\n"));
        let exec = "exec setpriv --reuid=redis --regid=redis --init-groups -- \
                    /usr/bin/redis-server /etc/redis/redis.conf $OPTS \"$@\"\n";
        assert!(text.ends_with(exec), "{text}");
    }

    #[test]
    fn units_that_cannot_be_translated_say_why() {
        for (unit, why) in [
            ("[Service]\nType=forking\nExecStart=/x\n", "forks"),
            ("[Service]\nExecStart=/x %i\n", "template"),
            ("[Service]\nType=oneshot\n", "no ExecStart"),
        ] {
            assert!(matches!(from_unit(unit), Start::Unknown(text) if text.contains(why)));
        }
    }

    #[test]
    fn services_that_fork_are_known() {
        assert!(matches!(known_start("nginx"), Some(Start::Command(_))));
        assert!(matches!(
            known_start("postgresql-15"),
            Some(Start::Script(_))
        ));
        assert_eq!(known_start("postgresql-client"), None);
        assert_eq!(known_start("cron"), None);
    }
}
