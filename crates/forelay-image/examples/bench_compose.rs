//! Times composing 50 components with 100,000 files against `mkfs.erofs` (Debian's
//! erofs-utils) building the same tree from a directory, in the same run.
//!
//! ```text
//! cargo run --release -p forelay-image --example bench_compose -- target/bench/compose.json
//! ```
//! Components are laid out as Debian packages are: own directories under /usr/lib and
//! /usr/share, some files in directories that all share. The composed image is then
//! mounted by the kernel (as one flat disk) and every file's size and every 97th file's
//! bytes are compared with the directory.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::os::unix::fs::{FileExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use forelay_image::erofs::layout::BLOCK_BYTES;
use forelay_image::erofs::merge::{ComposeOptions, Composed, Layer, MapLayout, compose};
use forelay_image::erofs::write::{Written, write_image};
use forelay_image::tree::{Attributes, FileData, Kind, Node, Tree};

const COMPONENTS: usize = 50;
const FILES: usize = 100_000;
const COMPOSE_RUNS: usize = 31;
const MKFS_RUNS: usize = 3;
const FILE_BYTES_MAX: usize = 16 << 10;

/// SplitMix64: the same components on every host.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) % bound as u64) as usize
    }
}

/// Where file `index` of a package goes.
fn path_of(package: &str, index: usize, random: &mut Random) -> String {
    let module = format!("module{:02}", random.below(24));
    match random.below(100) {
        0..3 => format!("usr/bin/{package}-{index}"),
        3..6 => format!(
            "usr/share/man/man{}/{package}-{index}.gz",
            1 + random.below(8)
        ),
        6..10 => {
            let language = random.below(40);
            format!("usr/share/locale/l{language:02}/LC_MESSAGES/{package}-{index}.mo")
        }
        10..14 => format!("usr/share/doc/{package}/examples/example-{index}"),
        14..16 => format!("etc/{package}/conf.d/{index}.conf"),
        16..50 => format!("usr/lib/x86_64-linux-gnu/{package}/{module}/lib{index}.so"),
        50..80 => format!(
            "usr/share/{package}/{module}/data/part{}/file-{index}",
            index % 5
        ),
        _ => format!("usr/lib/{package}/node_modules/{module}/lib/source-{index}.js"),
    }
}

/// Makes component `number`, as a tree and on the host below `root`.
fn component(number: usize, noise: &[u8], root: &Path) -> Tree {
    let mut random = Random(number as u64);
    let package = format!("package{number:02}");
    let mut tree = Tree::new();
    let mut attributes = Attributes::with_mode(0o644);
    attributes.mtime_s = 1_700_000_000 + number as i64;
    for index in 0..FILES / COMPONENTS {
        let path = path_of(&package, index, &mut random);
        let len = random.below(FILE_BYTES_MAX + 1) * random.below(101) / 100;
        let start = random.below(noise.len() - len);
        let bytes = &noise[start..start + len];
        let host = root.join(&path);
        fs::create_dir_all(host.parent().unwrap()).unwrap();
        fs::write(&host, bytes).unwrap();
        let node = |kind| Node {
            attributes: attributes.clone(),
            kind,
        };
        let kind = Kind::File(FileData::Bytes(bytes.into()));
        tree.insert_path(path.as_bytes(), node(kind)).unwrap();
        if random.below(20) == 0 {
            let target = format!("{}", host.file_name().unwrap().display());
            let link = format!("{path}.link");
            symlink(&target, root.join(&link)).unwrap();
            let kind = Kind::Symlink(target.into_bytes());
            tree.insert_path(link.as_bytes(), node(kind)).unwrap();
        }
    }
    tree
}

struct Built {
    path: PathBuf,
    metadata: Vec<u8>,
    written: Written,
}

fn build(number: usize, noise: &[u8], dir: &Path) -> Built {
    let tree = component(number, noise, &dir.join("tree"));
    let path = dir.join(format!("component-{number:02}"));
    let mut out = BufWriter::new(File::create(&path).unwrap());
    let written = write_image(&tree, &mut out).unwrap();
    out.flush().unwrap();
    let mut metadata = vec![0; written.image.metadata_bytes as usize];
    let file = File::open(&path).unwrap();
    file.read_exact_at(&mut metadata, 0).unwrap();
    Built {
        path,
        metadata,
        written,
    }
}

fn median(mut seconds: Vec<f64>) -> f64 {
    seconds.sort_by(f64::total_cmp);
    seconds[seconds.len() / 2]
}

/// Medians of elapsed and of CPU seconds; the latter say more on a busy host.
#[derive(Clone, Copy)]
struct Seconds {
    elapsed: f64,
    cpu: f64,
}

fn medians(runs: Vec<Seconds>) -> Seconds {
    Seconds {
        elapsed: median(runs.iter().map(|run| run.elapsed).collect()),
        cpu: median(runs.iter().map(|run| run.cpu).collect()),
    }
}

/// CPU seconds of this thread so far.
fn own_cpu_s() -> f64 {
    let text = fs::read_to_string("/proc/thread-self/schedstat").unwrap();
    let ns: f64 = text.split(' ').next().unwrap().parse().unwrap();
    ns / 1e9
}

/// CPU seconds of the children waited for so far (in ticks of 10 ms).
fn children_cpu_s() -> f64 {
    let text = fs::read_to_string("/proc/self/stat").unwrap();
    // After the command's name in brackets, `cutime` is field 14, `cstime` field 15.
    let fields = text.rsplit(')').next().unwrap().split_whitespace();
    let ticks: f64 = fields
        .skip(13)
        .take(2)
        .map(|t| t.parse::<f64>().unwrap())
        .sum();
    ticks / 100.0
}

fn time_compose(layers: &[Layer<'_>], runs: usize) -> (Seconds, Composed) {
    let options = ComposeOptions::default();
    let own = Tree::new();
    let mut composed = compose(layers, &own, options).unwrap();
    let mut seconds = Vec::new();
    for _ in 0..runs {
        let (start, cpu) = (Instant::now(), own_cpu_s());
        composed = compose(layers, &own, options).unwrap();
        seconds.push(Seconds {
            elapsed: start.elapsed().as_secs_f64(),
            cpu: own_cpu_s() - cpu,
        });
    }
    (medians(seconds), composed)
}

fn time_mkfs(dir: &Path) -> Seconds {
    let image = dir.join("mkfs.img");
    let seconds = (0..MKFS_RUNS).map(|_| {
        let _ = fs::remove_file(&image);
        let (start, cpu) = (Instant::now(), children_cpu_s());
        let output = Command::new("mkfs.erofs")
            .arg("--quiet")
            .args([&image, &dir.join("tree")])
            .output();
        let output = output.expect("mkfs.erofs is missing: apt-get install erofs-utils");
        assert!(output.status.success(), "{output:?}");
        Seconds {
            elapsed: start.elapsed().as_secs_f64(),
            cpu: children_cpu_s() - cpu,
        }
    });
    let seconds = medians(seconds.collect());
    fs::remove_file(&image).unwrap();
    seconds
}

/// Mounts the flat variant and compares it with the directory; false if not allowed to.
fn verify(layers: &[Layer<'_>], built: &[Built], dir: &Path) -> bool {
    let layout = MapLayout::Flat;
    let flat = compose(layers, &Tree::new(), ComposeOptions { layout }).unwrap();
    let disk = dir.join("flat");
    fs::write(&disk, &flat.map_image).unwrap();
    let file = File::options().write(true).open(&disk).unwrap();
    for (device, component) in flat.devices.iter().zip(built) {
        let bytes = fs::read(&component.path).unwrap();
        file.write_all_at(&bytes, u64::from(device.mapped_block) * BLOCK_BYTES)
            .unwrap();
    }
    let point = dir.join("mnt");
    fs::create_dir_all(&point).unwrap();
    let mount = Command::new("mount")
        .args(["-t", "erofs", "-o", "ro,loop"])
        .args([&disk, &point])
        .output()
        .unwrap();
    if !mount.status.success() {
        let error = String::from_utf8_lossy(&mount.stderr);
        println!("SKIPPED the check by kernel mount: {}", error.trim());
        return false;
    }
    let compared = std::panic::catch_unwind(|| compare(&dir.join("tree"), &point, &mut 0));
    let unmounted = Command::new("umount").arg(&point).status().unwrap();
    assert!(unmounted.success());
    let files = compared.expect("the mounted image differs from the directory");
    assert_eq!(files, FILES);
    true
}

fn compare(expected: &Path, found: &Path, counter: &mut usize) -> usize {
    let names = |path: &Path| {
        let entries = fs::read_dir(path).unwrap();
        let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        names
    };
    assert_eq!(names(expected), names(found), "{}", expected.display());
    let mut files = 0;
    for name in names(expected) {
        let (a, b) = (expected.join(&name), found.join(&name));
        let metadata = fs::symlink_metadata(&a).unwrap();
        if metadata.is_dir() {
            files += compare(&a, &b, counter);
        } else if metadata.is_symlink() {
            assert_eq!(fs::read_link(&a).unwrap(), fs::read_link(&b).unwrap());
        } else {
            files += 1;
            *counter += 1;
            assert_eq!(metadata.len(), fs::symlink_metadata(&b).unwrap().len());
            if counter.is_multiple_of(97) {
                assert_eq!(fs::read(&a).unwrap(), fs::read(&b).unwrap());
            }
        }
    }
    files
}

fn main() {
    let out = std::env::args().nth(1);
    let out = PathBuf::from(out.unwrap_or_else(|| "target/bench/compose.json".to_owned()));
    let parent = out.parent().unwrap();
    fs::create_dir_all(parent).unwrap();
    let dir = tempfile::tempdir_in(parent).unwrap();
    let mut random = Random(4242);
    let noise: Vec<u8> = (0..4 << 20).map(|_| random.below(256) as u8).collect();
    let built: Vec<Built> = (0..COMPONENTS)
        .map(|number| build(number, &noise, dir.path()))
        .collect();
    let layers: Vec<Layer<'_>> = built
        .iter()
        .map(|component| Layer {
            image: component.written.image.digest,
            image_bytes: component.written.image.bytes,
            metadata: &component.metadata,
            chunks: Some(&component.written.chunks),
            bundle: None,
        })
        .collect();
    let mkfs = time_mkfs(dir.path());
    let (ours, composed) = time_compose(&layers, COMPOSE_RUNS);
    let verified = verify(&layers, &built, dir.path());
    let report = serde_json::json!({
        "components": COMPONENTS,
        "files": FILES,
        "inodes": composed.inodes,
        "map_image_bytes": composed.map_image.len(),
        "conflicts": composed.conflicts.len(),
        "runs": COMPOSE_RUNS,
        "median_s": ours.elapsed,
        "median_cpu_s": ours.cpu,
        "mkfs_runs": MKFS_RUNS,
        "mkfs_median_s": mkfs.elapsed,
        "mkfs_median_cpu_s": mkfs.cpu,
        "ratio_to_mkfs": ours.elapsed / mkfs.elapsed,
        "cpu_ratio_to_mkfs": ours.cpu / mkfs.cpu,
        "verified_by_kernel_mount": verified,
    });
    fs::write(&out, format!("{report:#}\n")).unwrap();
    println!("{report:#}");
}
