//! The Debian cloud kernel as a component, kernel and an initramfs with the guest's init,
//! and its modules as another, for VMs that load some (a container engine does).
//!
//! The package is unpacked, not installed: its scripts would build an initramfs for the
//! host. Modules go below `/usr/lib` (on a merged-usr base `/lib` is a link, which a
//! directory would hide), with the lists that modprobe wants. A kernel is no part of its
//! VMs' tree; the component of its modules is, if a manifest names it, and requires the very
//! kernel that they are of. The initramfs is part of the image, so a new guest init gives
//! a new component.
//!
//! Invariant: the same package and the same init give the same image.

use std::fs;
use std::path::{Path, PathBuf};

use forelay_image::component::{Capability, NameRange, Role};
use forelay_image::tree::Tree;

use crate::apt::AptCache;
use crate::base::{DEFAULT_SUITE, made};
use crate::deb::{Deb, merge_usr, read_deb};
use crate::draft::{Draft, Imported, Part};
use crate::error::{ImportError, archive_error, io_error, text_of, tree_error};
use crate::initramfs::build_initramfs;
use crate::modules::{ModuleError, Modules, module_name};
use crate::progress::{BuildPhase, Progress, Reporter};
use crate::spool::{Compression, DEFAULT_LIMIT_BYTES, Spool};
use forelay_image::control::{Paragraph, parse_relations, sbom_package};

/// What a kernel is called unless the request says otherwise.
pub(crate) const KERNEL_NAME: &str = "linux-cloud";
/// Where the kernel is in the component.
pub const KERNEL_PATH: &str = "boot/vmlinuz";
/// Where the initramfs is in the component.
pub const INITRD_PATH: &str = "boot/initrd.cpio";

/// Kernel command line that every VM starts from.
pub const CMDLINE: &str = "console=ttyS0 panic=-1 net.ifnames=0";

/// Modules that the guest's init loads, before the root is there.
const BOOT_MODULES: &[&str] = &[
    "virtio_pci",
    "virtio_console",
    "virtio_pmem",
    "nd_pmem",
    "virtio_blk",
    "virtio_net",
    "virtio_rng",
    "virtio_balloon",
    "crc32c_generic",
    "erofs",
    "overlay",
    "ext4",
];

/// What kernel to build.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelOptions {
    /// Debian release.
    pub suite: String,
    /// The (meta)package.
    pub package: String,
    /// The static guest init on the host, which becomes `/init` of the initramfs.
    pub init: PathBuf,
}

impl KernelOptions {
    /// The cloud kernel of Debian 12 for this host's architecture, with `init`.
    pub fn new(init: &Path) -> Self {
        Self {
            suite: DEFAULT_SUITE.to_owned(),
            package: format!("linux-image-cloud-{}", crate::host_architecture()),
            init: init.to_owned(),
        }
    }
}

/// Builds the kernel component `name` and `name`-modules.
pub fn build_kernel(
    options: &KernelOptions,
    name: &str,
    apt: &AptCache,
    scratch: &Path,
    report: Reporter<'_>,
) -> Result<Imported, ImportError> {
    let init = fs::read(&options.init).map_err(io_error("reading", &options.init))?;
    if !init.starts_with(b"\x7fELF") {
        return Err(archive_error(
            &options.init,
            "not an executable for the guest's init",
        ));
    }
    let mut spool = Spool::new(scratch, DEFAULT_LIMIT_BYTES)?;
    let (path, deb) = download(options, apt, &mut spool, report)?;
    report(Progress::Started(BuildPhase::Read));
    let control = deb.control;
    let mut tree = deb.tree;
    merge_usr(&mut tree, &path)?;
    let release = kernel_release(&tree, &path)?;
    let modules = read_modules(&tree, &release, &path)?;
    check_modules(&modules).map_err(module_error(&path))?;
    arrange(&mut tree, &release, &modules, &path)?;
    let order = modules
        .load_order(&boot_modules(&modules))
        .map_err(module_error(&path))?;
    let directory = format!("usr/lib/modules/{release}");
    let mut loaded = Vec::new();
    for name in &order {
        let place = modules.path(name).unwrap_or_default();
        let mut bytes = module_bytes(&tree, &format!("{directory}/{place}"), &path)?;
        remove_signature(&mut bytes);
        loaded.push((
            format!("lib/modules/{release}/{}", uncompressed_name(place)),
            bytes,
        ));
    }
    let initrd = build_initramfs(&init, &loaded).map_err(io_error("building", INITRD_PATH))?;
    tree.put_file(INITRD_PATH, initrd, made(0o644))
        .map_err(tree_error(&path))?;
    let split_off = vec![take_modules(&mut tree, &control, name, &release)];
    let draft = describe(&control, name, &release);
    Ok(Imported {
        main: Part::new(tree, draft),
        split_off,
        spools: vec![spool],
    })
}

/// Downloads the kernel package, through the metapackage that depends on it.
fn download(
    options: &KernelOptions,
    apt: &AptCache,
    spool: &mut Spool,
    report: Reporter<'_>,
) -> Result<(PathBuf, Deb), ImportError> {
    let lock = apt.lock()?;
    apt.refresh(&lock, report)?;
    report(Progress::Started(BuildPhase::Download));
    let mut package = options.package.clone();
    // meta package -> (another) -> the kernel itself
    for _ in 0..3 {
        let path = apt.download(&lock, &package, report)?;
        let deb = read_deb(&path, spool)?;
        if deb.tree.lookup(b"boot").is_some() {
            return Ok((path, deb));
        }
        let depends = parse_relations(deb.control.field("Depends"));
        let next = depends.into_iter().flatten().map(|relation| relation.name);
        let next = next
            .into_iter()
            .find(|name| name.starts_with("linux-image-"));
        let Some(next) = next else {
            return Err(archive_error(path, "holds no kernel and depends on none"));
        };
        package = next;
    }
    Err(ImportError::Request(format!(
        "{} leads to no kernel",
        options.package
    )))
}

fn module_error(path: &Path) -> impl Fn(ModuleError) -> ImportError {
    let path = path.to_owned();
    move |error| archive_error(&path, error.to_string())
}

/// The release (`6.1.0-56-cloud-amd64`): the one directory of modules.
fn kernel_release(tree: &Tree, path: &Path) -> Result<String, ImportError> {
    let directory = tree.lookup(b"usr/lib/modules");
    let entries = directory.and_then(|id| tree.entries(id));
    let names: Vec<&Vec<u8>> = entries.into_iter().flat_map(|e| e.keys()).collect();
    match names[..] {
        [name] => Ok(String::from_utf8_lossy(name).into_owned()),
        _ => Err(archive_error(
            path,
            "does not hold the modules of one kernel",
        )),
    }
}

fn read_modules(tree: &Tree, release: &str, path: &Path) -> Result<Modules, ImportError> {
    let directory = format!("usr/lib/modules/{release}");
    let builtin = text_of(tree, &format!("{directory}/modules.builtin"))?;
    let mut modules = Modules::new(&builtin.unwrap_or_default());
    let Some(top) = tree.lookup(directory.as_bytes()) else {
        return Ok(modules);
    };
    let mut pending = vec![(String::new(), top)];
    while let Some((place, id)) = pending.pop() {
        for (name, &child) in tree.entries(id).into_iter().flatten() {
            let name = String::from_utf8_lossy(name);
            let place = match place.as_str() {
                "" => name.into_owned(),
                parent => format!("{parent}/{name}"),
            };
            if tree.entries(child).is_some() {
                pending.push((place, child));
            } else if place.contains(".ko") {
                let bytes = module_bytes(tree, &format!("{directory}/{place}"), path)?;
                modules.add(&place, &bytes).map_err(module_error(path))?;
            }
        }
    }
    Ok(modules)
}

/// A module's content, decompressed (later Debian releases compress modules).
fn module_bytes(tree: &Tree, place: &str, path: &Path) -> Result<Vec<u8>, ImportError> {
    let Some(data) = tree.file(place.as_bytes()) else {
        return Err(archive_error(path, format!("has no module {place}")));
    };
    let stored = data.read().map_err(io_error("reading", place))?;
    let compression = Compression::detect(&stored);
    if compression == Compression::None {
        return Ok(stored);
    }
    let mut bytes = Vec::new();
    compression
        .reader(&stored[..])
        .and_then(|reader| std::io::Read::read_to_end(&mut { reader }, &mut bytes))
        .map_err(io_error("decompressing", place))?;
    Ok(bytes)
}

/// Takes the signature off a module that init loads: the component's digest vouches for it
/// already, and the guest would check each before it has a root. Modules in the image keep
/// theirs. (`struct module_signature` and the marker behind it are in the kernel's
/// include/linux/module_signature.h; the length is its last field, big endian.)
fn remove_signature(module: &mut Vec<u8>) {
    const MARKER: &[u8] = b"~Module signature appended~\n";
    const HEADER_BYTES: usize = 12;
    let Some(signed) = module.strip_suffix(MARKER) else {
        return;
    };
    let Some((rest, length)) = signed.split_last_chunk() else {
        return;
    };
    let signature = u32::from_be_bytes(*length) as usize + HEADER_BYTES - length.len();
    if let Some(bytes) = rest.len().checked_sub(signature) {
        module.truncate(bytes);
    }
}

fn uncompressed_name(place: &str) -> String {
    let stem = place.split(".ko").next().unwrap_or(place);
    format!("{stem}.ko")
}

fn boot_modules(modules: &Modules) -> Vec<&'static str> {
    let known = |name: &&&str| modules.has(&module_name(name));
    BOOT_MODULES.iter().filter(known).copied().collect()
}

/// Checks that the kernel has what no VM does without.
fn check_modules(modules: &Modules) -> Result<(), ModuleError> {
    for needed in ["virtio_pmem", "erofs", "overlay", "virtio_console"] {
        if !modules.has(needed) {
            return Err(ModuleError::Missing {
                name: needed.to_owned(),
                needed_by: "every Forelay VM".to_owned(),
            });
        }
    }
    Ok(())
}

/// Leaves the kernel, its modules and their lists; documentation goes.
fn arrange(
    tree: &mut Tree,
    release: &str,
    modules: &Modules,
    path: &Path,
) -> Result<(), ImportError> {
    let directory = format!("usr/lib/modules/{release}");
    let vmlinuz = format!("boot/vmlinuz-{release}");
    let Some(kernel) = tree.lookup(vmlinuz.as_bytes()) else {
        return Err(archive_error(path, format!("has no /{vmlinuz}")));
    };
    if let Some(boot) = tree.lookup(b"boot") {
        let linked = tree.link(boot, b"vmlinuz", kernel);
        linked.map_err(tree_error(path))?;
    }
    for gone in [
        vmlinuz.clone(),
        format!("boot/System.map-{release}"),
        "usr/share/bug".to_owned(),
        "usr/share/lintian".to_owned(),
        format!("usr/share/doc/linux-image-{release}/changelog.gz"),
        format!("{directory}/modules.builtin.modinfo"),
    ] {
        tree.remove_path(gone.as_bytes());
    }
    for (name, bytes) in modules.lists().map_err(module_error(path))? {
        tree.put_file(&format!("{directory}/{name}"), bytes, made(0o644))
            .map_err(tree_error(path))?;
    }
    Ok(())
}

/// Takes the modules out of the kernel's tree, as a component that goes with this kernel.
fn take_modules(tree: &mut Tree, control: &Paragraph, kernel: &str, release: &str) -> Part {
    let mut part = tree.clone();
    part.remove_path(b"boot");
    tree.remove_path(b"usr/lib");
    let version = control.field("Version").to_owned();
    let name = format!("{kernel}-modules");
    let architecture = control.field("Architecture");
    let mut draft = Draft::new(&name, &version, Role::Package, architecture, ());
    draft.description = format!("Modules of {release}, loaded when they are wanted");
    let range = format!("= {version}");
    let any = |name: &str, range: String| {
        vec![NameRange {
            name: name.to_owned(),
            range,
        }]
    };
    // What the kernel's own package depends on to load modules.
    draft.requires = vec![
        any(control.field("Package"), range),
        any("kmod", String::new()),
    ];
    draft.requires.sort();
    draft.sbom = vec![sbom_package(control)];
    Part::new(part, draft)
}

fn describe(control: &Paragraph, name: &str, release: &str) -> Draft {
    let version = control.field("Version").to_owned();
    let architecture = control.field("Architecture");
    let mut draft = Draft::new(name, &version, Role::Kernel, architecture, ());
    draft.description = control.summary().to_owned();
    draft.cmdline = Some(CMDLINE.to_owned());
    draft.provides = vec![
        Capability {
            name: "linux-image".to_owned(),
            version: Some(version),
        },
        Capability {
            name: control.field("Package").to_owned(),
            version: Some(control.field("Version").to_owned()),
        },
    ];
    draft.provides.sort();
    draft.notes = vec![format!(
        "unpacked, not installed: kernel {release}, initramfs made by Forelay"
    )];
    draft.sbom = vec![sbom_package(control)];
    draft
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_loses_its_signature_and_one_without_stays_as_it_is() {
        let signed = |length: u32| {
            let mut module = b"\x7fELF module".to_vec();
            module.extend_from_slice(&[7; 40]);
            module.extend_from_slice(&[2, 0, 0, 0, 0, 0, 0, 0]);
            module.extend_from_slice(&length.to_be_bytes());
            module.extend_from_slice(b"~Module signature appended~\n");
            module
        };
        let after = |mut module: Vec<u8>| {
            remove_signature(&mut module);
            module
        };
        assert_eq!(after(signed(40)), b"\x7fELF module");
        for same in [signed(1000), b"\x7fELF".to_vec(), Vec::new()] {
            assert_eq!(after(same.clone()), same);
        }
    }

    #[test]
    fn compressed_module_names_lose_their_suffix() {
        assert_eq!(
            uncompressed_name("kernel/fs/erofs.ko.xz"),
            "kernel/fs/erofs.ko"
        );
        assert_eq!(
            uncompressed_name("kernel/fs/erofs.ko"),
            "kernel/fs/erofs.ko"
        );
    }

    #[test]
    fn a_kernel_without_pmem_is_refused() {
        let error = check_modules(&Modules::new("")).unwrap_err();
        assert!(error.to_string().contains("every Forelay VM"), "{error}");
    }
}
