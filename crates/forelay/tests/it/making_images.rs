//! Container images as people have them, made by the tools that people make them with: buildah
//! from Debian packages, pip and npm packages, umoci from a tree of busybox.
//!
//! Owns where they are kept: in `images` of `$FORELAY_TEST_CACHE`, made once.

use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use forelay_image::Digest;
use forelay_import::apt::AptCache;

/// Layers of the image `layers`.
pub const LAYERS: usize = 60;

const SUITE: &str = "bookworm";

const DEBIAN: &str = r#"FROM scratch
ADD debian.tar /
RUN useradd --uid 1234 --create-home app && install -d -o app -m 2750 /srv/data && \
    touch -d '2001-02-03 04:05:06.789' /srv/data/old && ln /srv/data/old /srv/data/older
RUN rm -rf /usr/share/bash-completion /etc/default && mkdir -m 1777 /etc/default && \
    ln /usr/bin/python3.11 /usr/local/bin/snake && ln -s ../srv/data/old /etc/old && \
    mkfifo /srv/data/pipe && chmod u+s /usr/bin/env
RUN python3 -c 'import os; os.setxattr("/srv/data/old", "user.note", b"a\0b"); \
    os.setxattr("/usr/bin/nice", "security.capability", \
    b"\1\0\0\2\0\4\0\0\0\0\0\0\0\0\0\0\0\0\0\0")'
CMD ["cat", "/etc/debian_version"]
"#;

const PYTHON: &str = r#"FROM localhost/debian
COPY site /usr/local/lib/python3.11/dist-packages/
RUN python3 -m compileall -q /usr/local/lib/python3.11/dist-packages/flask && \
    rm /usr/bin/python3.11-config /usr/bin/pdb3* || true
COPY --chown=1234:33 app.py /srv/app/
USER app
WORKDIR /srv/app
ENV GREETING="hello from flask"
EXPOSE 8000
ENTRYPOINT ["python3", "app.py"]
"#;

const APP: &str = r#"import os
from flask import Flask

app = Flask(__name__)


@app.get("/")
def index():
    return f"{os.environ['GREETING']} as {os.getuid()} in {os.getcwd()}\n"


app.run(host="0.0.0.0", port=8000)
"#;

const NODE: &str = r#"FROM scratch
COPY libraries /
COPY node /usr/local/bin/node
COPY modules/node_modules /srv/app/node_modules
COPY app.js /srv/app/
WORKDIR /srv/app
ENTRYPOINT ["node", "app.js"]
"#;

const APP_JS: &str = "require('express')().get('/', (_, to) => to.send('hello')).listen(8000)\n";

/// Packages of the two applications.
const PIP: &str = "flask==3.1.0";
const NPM: [&str; 2] = ["express@4.21.2", "mkdirp@1.0.4"];

/// The images: a layout of the OCI and the tags in it, or why there are none.
pub fn images() -> Result<(PathBuf, Vec<String>), String> {
    for tool in ["buildah", "umoci", "skopeo", "mmdebstrap"] {
        let tried = Command::new(tool).arg("--version").output();
        if !tried.is_ok_and(|output| output.status.success()) {
            return Err(format!("needs {tool}"));
        }
    }
    let cache = std::env::var_os("FORELAY_TEST_CACHE").ok_or("needs FORELAY_TEST_CACHE")?;
    let dir = PathBuf::from(cache).join("images");
    fs::create_dir_all(&dir).map_err(|error| error.to_string())?;
    let lock = File::create(dir.join("lock")).map_err(|error| error.to_string())?;
    lock.lock().map_err(|error| error.to_string())?;
    let recipe = [DEBIAN, PYTHON, APP, NODE, APP_JS, PIP, NPM[0], NPM[1], "1"].concat();
    let layout = dir.join(Digest::of(recipe.as_bytes()).short());
    if !layout.exists() {
        let making = dir.join("making");
        let _ = fs::remove_dir_all(&making);
        fs::create_dir_all(&making).map_err(|error| error.to_string())?;
        Making { at: making.clone() }.all();
        fs::rename(making.join("layout"), &layout).map_err(|error| error.to_string())?;
        fs::remove_dir_all(&making).map_err(|error| error.to_string())?;
    }
    let tags = run(Command::new("umoci")
        .arg("list")
        .arg("--layout")
        .arg(&layout));
    Ok((layout, tags.lines().map(str::to_owned).collect()))
}

/// Runs a tool that must succeed; what it printed.
#[track_caller]
pub fn run(command: &mut Command) -> String {
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{command:?}: {said}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Where images are being made.
struct Making {
    at: PathBuf,
}

impl Making {
    fn path(&self, name: &str) -> PathBuf {
        self.at.join(name)
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.path(name), text).unwrap();
    }

    fn all(&self) {
        eprintln!("making container images for the tests");
        run(Command::new("umoci")
            .args(["init", "--layout"])
            .arg(self.path("layout")));
        self.busybox();
        self.layers();
        self.debian_tree();
        self.buildah("debian", DEBIAN);
        self.write("app.py", APP);
        let mut pip = Command::new("python3");
        pip.args([
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-compile",
            "--only-binary=:all:",
        ]);
        pip.args([
            "--python-version",
            "3.11",
            "--implementation",
            "cp",
            "--target",
        ]);
        run(pip.arg(self.path("site")).arg(PIP));
        self.buildah("python", PYTHON);
        match Command::new("npm").arg("--version").output() {
            Ok(_) => self.node(),
            Err(_) => eprintln!("NOT MADE: an image of Node, for want of npm"),
        }
    }

    /// A tree of busybox as Alpine's is: each applet a name of one file.
    fn busybox(&self) {
        let image = format!("{}:busybox", self.path("layout").display());
        let bundle = self.path("bundle");
        let umoci = |words: &[&str]| {
            let mut command = Command::new("umoci");
            command.args(words).args(["--image", &image]);
            command
        };
        run(&mut umoci(&["new"]));
        run(umoci(&["unpack"]).arg(&bundle));
        let root = bundle.join("rootfs");
        for dir in ["bin", "etc/apk", "lib/apk/db", "srv", "tmp", "usr/bin"] {
            fs::create_dir_all(root.join(dir)).unwrap();
        }
        fs::copy("/bin/busybox", root.join("bin/busybox")).unwrap();
        run(Command::new("chroot")
            .arg(&root)
            .args(["/bin/busybox", "--install", "/bin"]));
        let installed = "P:musl\nV:1.2.4-r2\nA:x86_64\n\nP:busybox\nV:1.36.1-r5\nA:x86_64\n\n";
        for (path, text) in [
            ("etc/alpine-release", "3.18.4\n"),
            ("etc/os-release", "ID=alpine\nVERSION_ID=3.18.4\n"),
            ("etc/passwd", "root:x:0:0:root:/root:/bin/ash\n"),
            ("lib/apk/db/installed", installed),
        ] {
            fs::write(root.join(path), text).unwrap();
        }
        symlink("/bin/busybox", root.join("usr/bin/env")).unwrap();
        run(umoci(&["repack", "--refresh-bundle"]).arg(&bundle));
        // A second layer, which takes back some of the first.
        fs::remove_file(root.join("bin/ash")).unwrap();
        fs::remove_dir(root.join("srv")).unwrap();
        fs::write(root.join("srv"), "a file now\n").unwrap();
        run(umoci(&["repack"]).arg(&bundle));
        run(&mut umoci(&[
            "config",
            "--config.cmd",
            "/bin/busybox",
            "--config.cmd",
            "true",
        ]));
    }

    /// As many layers as nobody should have, over it.
    fn layers(&self) {
        let image = format!("{}:busybox", self.path("layout").display());
        run(Command::new("umoci").args(["tag", "--image", &image, "layers"]));
        let image = format!("{}:layers", self.path("layout").display());
        for number in 3..=LAYERS {
            let part = self.path(&format!("part-{number}"));
            fs::create_dir_all(part.join("sub")).unwrap();
            fs::write(
                part.join("sub").join(number.to_string()),
                number.to_string(),
            )
            .unwrap();
            let mut insert = Command::new("umoci");
            insert.args(["insert", "--image", &image]);
            run(match number {
                40 => insert.args(["--whiteout", "/parts/7/sub"]),
                50 => insert.arg("--opaque").arg(&part).arg("/parts/8"),
                _ => insert.arg(&part).arg(format!("/parts/{}", number % 20)),
            });
        }
    }

    /// A tree of Debian's with Python, as mmdebstrap makes it.
    fn debian_tree(&self) {
        let apt = AptCache::open(&self.path("apt"), SUITE, Duration::ZERO).unwrap();
        let mut command = Command::new("unshare");
        command.args([
            "--mount",
            "--propagation",
            "private",
            "--",
            "mmdebstrap",
            "--quiet",
        ]);
        command.args(["--mode=root", "--variant=minbase", "--include=python3"]);
        for left_out in ["doc", "locale", "man"] {
            command.arg(format!("--dpkgopt=path-exclude=/usr/share/{left_out}/*"));
        }
        if let Some(settings) = apt.write_acquire_settings().unwrap() {
            command.arg(format!("--aptopt={}", settings.display()));
        }
        command.arg(SUITE).arg(self.path("debian.tar"));
        run(command.arg(apt.write_sources().unwrap()));
    }

    /// Builds an image with buildah; its context is all that is here.
    fn buildah(&self, name: &str, recipe: &str) {
        let file = self.path("Containerfile");
        fs::write(&file, recipe).unwrap();
        let buildah = || {
            let mut command = Command::new("buildah");
            command.arg("--root").arg(self.path("storage"));
            command.arg("--runroot").arg(self.path("running"));
            command.args(["--storage-driver", "vfs"]);
            command
        };
        // Only what a recipe names is looked at of the context.
        self.write(
            ".containerignore",
            "storage\nrunning\nlayout\nbundle\napt\n",
        );
        let mut build = buildah();
        build.args(["bud", "--isolation", "chroot", "--layers", "-t", name, "-f"]);
        run(build.arg(&file).arg(&self.at));
        let to = format!("oci:{}:{name}", self.path("layout").display());
        run(buildah().args(["push", "--quiet", name, &to]));
    }

    fn node(&self) {
        let program = run(Command::new("sh").args(["-c", "readlink -f $(command -v node)"]));
        fs::copy(program.trim(), self.path("node")).unwrap();
        let libraries = self.path("libraries");
        let linked = run(Command::new("ldd").arg(self.path("node")));
        let mut words: Vec<&str> = linked.split_whitespace().collect();
        words.retain(|word| word.starts_with('/'));
        for word in words {
            let to = libraries.join(&word[1..]);
            fs::create_dir_all(to.parent().unwrap()).unwrap();
            fs::copy(Path::new(word), to).unwrap();
        }
        let modules = self.path("modules");
        fs::create_dir(&modules).unwrap();
        let mut npm = Command::new("npm");
        npm.args(["install", "--silent", "--no-audit", "--no-fund", "--prefix"]);
        run(npm.arg(&modules).args(NPM));
        self.write("app.js", APP_JS);
        self.buildah("node", NODE);
    }
}
