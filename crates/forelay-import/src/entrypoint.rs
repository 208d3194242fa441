//! The command that runs a package's service in the foreground.
//!
//! Owns what a systemd unit says about it, turned into a start script (user, runtime
//! directories, those of `tmpfiles.d` included, environment, `ExecStartPre`, `ExecStart`),
//! and a short list of services whose units put themselves into the background, or that need
//! what a build leaves out. Refuses to guess: a unit that cannot be translated
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

const OPENSSH: &str = r#"#!/bin/sh
# Made by Forelay: starts the SSH server in the foreground, with keys of this VM's own.
set -eu
install -d -m 755 /run/sshd
ssh-keygen -A
exec /usr/sbin/sshd -D -e "$@"
"#;

/// Services whose units do not do, by the package that has the unit.
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
        "openssh-server" => Some(Start::Script(OPENSSH.to_owned())),
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

/// Lines of a script that make the directories below `/run` which `tmpfiles.d` asks for.
pub fn run_directories(tmpfiles: &str) -> Vec<String> {
    let lines = tmpfiles.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        let kind = words
            .next()?
            .trim_end_matches(['+', '!', '-', '=', '~', '^']);
        let path = words.next()?;
        let path = path
            .strip_prefix("/var")
            .filter(|rest| rest.starts_with("/run/"))
            .unwrap_or(path);
        if !matches!(kind, "d" | "D" | "v" | "q" | "Q") || !path.starts_with("/run/") {
            return None;
        }
        let mut option = |option: &str, default: &str| {
            let word = words.next().unwrap_or("-");
            let word = if word == "-" { default } else { word };
            let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
            word.chars().all(plain).then(|| format!("{option} {word}"))
        };
        let (mode, user, group) = (
            option("-m", "0755")?,
            option("-o", "root")?,
            option("-g", "root")?,
        );
        let plain = path
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || "-_./@".contains(c));
        // As systemd-tmpfiles, which goes on after what fails.
        plain.then(|| format!("install -d {mode} {user} {group} {path} || :"))
    });
    lines.collect()
}

/// `text` with systemd's specifiers that have a meaning outside it, and its `$$`, as a shell
/// has them.
fn expand(text: &str, name: &str) -> String {
    let values = [
        ("%%", "\0"),
        ("%H", "$(uname -n)"),
        ("%l", "$(uname -n)"),
        ("%p", name),
        ("%N", name),
        ("%t", "/run"),
        ("%S", "/var/lib"),
        ("%C", "/var/cache"),
        ("%L", "/var/log"),
        ("$$", "\\$"),
    ];
    values
        .into_iter()
        .fold(text.to_owned(), |text, (from, to)| text.replace(from, to))
}

/// Reads the text of the unit `name.service`. Its script begins with `prepare`.
pub fn from_unit(unit: &str, name: &str, prepare: &[String]) -> Start {
    let unit = &expand(unit, name);
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
    let user = service.last("User").filter(|user| *user != "root");
    let directories = service.words("RuntimeDirectory");
    let plain = user.is_none()
        && directories.is_empty()
        && prepare.is_empty()
        && service.all("ExecStartPre").next().is_none()
        && service.words("StateDirectory").is_empty()
        && service.all("EnvironmentFile").next().is_none()
        && service.all("Environment").next().is_none()
        && !command.contains(['$', '"', '\'', '\\', ';', '&', '|', '<', '>', '*', '(', '`']);
    let template = || Start::Unknown("its systemd unit is a template".to_owned());
    if plain && command.contains('%') {
        return template();
    }
    if plain {
        let words = command.split_whitespace();
        return Start::Command(words.map(|word| word.replace('\0', "%")).collect());
    }
    let text = script(&service, user, command, prepare);
    match text.contains('%') {
        true => template(),
        false => Start::Script(text.replace('\0', "%")),
    }
}

/// Commands that make the directories that a unit asks for.
fn directories(service: &Service<'_>, owner: &str) -> String {
    let mut text = String::new();
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
    text
}

/// Commands that set the environment of a unit.
fn environment(service: &Service<'_>) -> String {
    let mut text = String::new();
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
    text
}

fn script(service: &Service<'_>, user: Option<&str>, command: &str, prepare: &[String]) -> String {
    let mut text = String::from(
        "#!/bin/sh\n# Made by Forelay from the package's systemd unit: starts the service in the \
         foreground.\nset -eu\n",
    );
    let group = service.last("Group").or(user);
    let owner = user.map_or(String::new(), |user| {
        format!("-o {user} -g {} ", group.unwrap_or(user))
    });
    text.push_str(&directories(service, &owner));
    for line in prepare {
        text.push_str(&format!("{line}\n"));
    }
    text.push_str(&environment(service));
    // systemd replaces an unset variable by nothing.
    text.push_str("set +u\n");
    if let Some(directory) = service.last("WorkingDirectory") {
        let directory = directory.trim_start_matches('-');
        text.push_str(&format!("cd {directory}\n"));
    }
    let kept: Vec<String> = service
        .words("AmbientCapabilities")
        .iter()
        .filter_map(|word| Some(format!("+{}", word.strip_prefix("CAP_")?.to_lowercase())))
        .collect();
    let capabilities = match kept.join(",") {
        none if none.is_empty() => none,
        kept => format!("--inh-caps={kept} --ambient-caps={kept} "),
    };
    let switch = user.map_or(String::new(), |user| {
        let group = group.unwrap_or(user);
        format!("setpriv --reuid={user} --regid={group} --init-groups {capabilities}-- ")
    });
    let as_root = service
        .last("PermissionsStartOnly")
        .is_some_and(|one| one != "false");
    for before in service.all("ExecStartPre") {
        let command = before.trim_start_matches(['-', '@', ':', '+', '!']);
        let prefix = &before[..before.len() - command.len()];
        let switch = if as_root || prefix.contains(['+', '!']) {
            ""
        } else {
            &switch
        };
        let may_fail = if prefix.contains('-') { " || :" } else { "" };
        text.push_str(&format!("{switch}{command}{may_fail}\n"));
    }
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
        assert_eq!(from_unit(unit, "cron", &[]), Start::Command(words.to_vec()));
    }

    #[test]
    fn user_directories_and_environment_go_into_a_script() {
        let unit = "[Service]\nType=notify\nUser=redis\nGroup=redis\nRuntimeDirectory=redis\n\
                    RuntimeDirectoryMode=2755\nEnvironmentFile=-/etc/default/redis\n\
                    ExecStart=/usr/bin/redis-server /etc/redis/redis.conf $OPTS\n\
                    [Install]\nAlias=redis.service\n";
        let Start::Script(text) = from_unit(unit, "redis", &[]) else {
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
            assert!(
                matches!(from_unit(unit, "x", &[]), Start::Unknown(text) if text.contains(why))
            );
        }
    }

    #[test]
    fn what_comes_before_a_service_is_in_its_script() {
        let unit = "[Service]\nType=notify\nUser=etcd\nPermissionsStartOnly=true\n\
                    AmbientCapabilities=CAP_NET_BIND_SERVICE CAP_IPC_LOCK\n\
                    Environment=ETCD_NAME=%H\nEnvironmentFile=-/etc/default/%p\n\
                    ExecStartPre=-/usr/bin/helper 100%%\nExecStartPre=/bin/sh -c \"echo $$PPID\"\n\
                    ExecStart=/usr/bin/etcd $ARGS\n";
        let tmpfiles = "# comment\nd /run/etcd 0750 etcd -\nf /run/etcd/x\nD! /var/run/more\n\
                        d /var/lib/etcd\nd /run/$(evil) 0755\n";
        let prepare = run_directories(tmpfiles);
        let Start::Script(text) = from_unit(unit, "etcd", &prepare) else {
            panic!("no script");
        };
        let expected = "install -d -m 0750 -o etcd -g root /run/etcd || :\n\
                        install -d -m 0755 -o root -g root /run/more || :\n\
                        export ETCD_NAME=$(uname -n)\nset -a\n\
                        if [ -r /etc/default/etcd ]; then . /etc/default/etcd; fi\nset +a\nset +u\n\
                        /usr/bin/helper 100% || :\n/bin/sh -c \"echo \\$PPID\"\n\
                        exec setpriv --reuid=etcd --regid=etcd --init-groups \
                        --inh-caps=+net_bind_service,+ipc_lock \
                        --ambient-caps=+net_bind_service,+ipc_lock -- /usr/bin/etcd $ARGS \"$@\"\n";
        assert!(text.ends_with(expected), "{text}");
        let ran = std::process::Command::new("sh")
            .args(["-n", "-c", &text])
            .status();
        assert!(ran.unwrap().success());
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
