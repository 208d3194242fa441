//! Kernel modules: what a module depends on, and the order to load a set of them in.
//!
//! Owns the meaning of a module's `.modinfo` section (64-bit little-endian ELF) and of
//! `modules.builtin`; the lists that depmod would make for modprobe are derived from those.
//! Module names count `-` and `_` as the same character, as the kernel does.
//!
//! Invariant: bytes of a module are untrusted; a damaged one is an error, not a panic.

use std::collections::{BTreeMap, BTreeSet};

use crate::kmod_index::kmod_index;
use object::read::elf::ElfFile64;
use object::{LittleEndian, Object, ObjectSection};

/// Why a set of modules cannot be put together.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ModuleError {
    /// Not a kernel module for a 64-bit little-endian machine, or cut off.
    #[error("{0} is not a kernel module")]
    NotAModule(String),
    /// Not there, neither as a file nor built in.
    #[error("the kernel has no module {name} (needed by {needed_by})")]
    Missing {
        /// The module.
        name: String,
        /// What needs it.
        needed_by: String,
    },
    /// Modules that need each other.
    #[error("the modules {0} depend on each other")]
    Cycle(String),
}

/// The name that the kernel knows a module by: `virtio-rng.ko` is `virtio_rng`.
pub fn module_name(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    let stem = file.split(".ko").next().unwrap_or(file);
    stem.replace('-', "_")
}

/// The modules of one kernel.
#[derive(Clone, Debug, Default)]
pub struct Modules {
    paths: BTreeMap<String, String>,
    dependencies: BTreeMap<String, Vec<String>>,
    /// By module: other names for it, with wildcards.
    aliases: BTreeMap<String, Vec<String>>,
    builtin: BTreeSet<String>,
}

impl Modules {
    /// A kernel with the built-in modules listed in `builtin`, the text of
    /// `modules.builtin`.
    pub fn new(builtin: &str) -> Self {
        let builtin = builtin
            .lines()
            .map(str::trim)
            .filter(|line| !line.is_empty());
        Self {
            builtin: builtin.map(module_name).collect(),
            ..Self::default()
        }
    }

    /// Adds the module at `path` (relative to the modules directory) with content `bytes`.
    pub fn add(&mut self, path: &str, bytes: &[u8]) -> Result<(), ModuleError> {
        let Some(info) = modinfo(bytes) else {
            return Err(ModuleError::NotAModule(path.to_owned()));
        };
        let (mut needs, mut aliases) = (Vec::new(), Vec::new());
        for (key, value) in info {
            match key.as_str() {
                "depends" => {
                    let names = value.split(',').filter(|name| !name.is_empty());
                    needs.extend(names.map(module_name));
                }
                "alias" => aliases.push(alias_name(&value)),
                _ => {}
            }
        }
        let name = module_name(path);
        self.aliases.insert(name.clone(), aliases);
        self.dependencies.insert(name.clone(), needs);
        self.paths.insert(name, path.to_owned());
        Ok(())
    }

    /// The path of a module that is a file.
    pub fn path(&self, name: &str) -> Option<&str> {
        self.paths.get(name).map(String::as_str)
    }

    /// Whether the kernel has the module, as a file or built in.
    pub fn has(&self, name: &str) -> bool {
        self.builtin.contains(name) || self.paths.contains_key(name)
    }

    /// `wanted` and all that they need, dependencies first; built-in ones left out.
    pub fn load_order(&self, wanted: &[&str]) -> Result<Vec<String>, ModuleError> {
        let mut order = Vec::new();
        let mut visiting = Vec::new();
        for name in wanted {
            self.visit(&module_name(name), "the request", &mut visiting, &mut order)?;
        }
        Ok(order)
    }

    fn visit(
        &self,
        name: &str,
        needed_by: &str,
        visiting: &mut Vec<String>,
        order: &mut Vec<String>,
    ) -> Result<(), ModuleError> {
        if self.builtin.contains(name) || order.iter().any(|known| known == name) {
            return Ok(());
        }
        if visiting.iter().any(|known| known == name) {
            return Err(ModuleError::Cycle(visiting.join(", ")));
        }
        let Some(needs) = self.dependencies.get(name) else {
            return Err(ModuleError::Missing {
                name: name.to_owned(),
                needed_by: needed_by.to_owned(),
            });
        };
        visiting.push(name.to_owned());
        for need in needs {
            self.visit(need, name, visiting, order)?;
        }
        visiting.pop();
        order.push(name.to_owned());
        Ok(())
    }

    /// The lists by which modprobe finds the modules: name and content.
    pub fn lists(&self) -> Result<[(&'static str, Vec<u8>); 4], ModuleError> {
        let mut text = String::new();
        let mut dependencies = BTreeMap::new();
        let mut aliases: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for name in self.paths.keys() {
            let order = self.load_order(&[name])?;
            let (own, needs) = order.split_last().map_or((name, &[][..]), |(o, n)| (o, n));
            let path = |name: &String| self.path(name).unwrap_or_default().to_owned();
            // Nearest dependency first, as depmod writes them.
            let needs: Vec<String> = needs.iter().rev().map(path).collect();
            let line = format!("{}: {}", path(own), needs.join(" "));
            text.push_str(line.trim_end());
            text.push('\n');
            dependencies.insert(name.clone(), vec![line.trim_end().to_owned()]);
            for alias in self.aliases.get(name).into_iter().flatten() {
                aliases.entry(alias.clone()).or_default().push(name.clone());
            }
        }
        let builtin = self
            .builtin
            .iter()
            .map(|name| (name.clone(), vec![String::new()]));
        Ok([
            ("modules.dep", text.into_bytes()),
            ("modules.dep.bin", kmod_index(&dependencies)),
            ("modules.alias.bin", kmod_index(&aliases)),
            ("modules.builtin.bin", kmod_index(&builtin.collect())),
        ])
    }
}

/// An alias as it is looked up: `-` is `_` but for what stands in brackets.
fn alias_name(alias: &str) -> String {
    let mut in_brackets = false;
    let normal = |c: char| {
        in_brackets = c == '[' || in_brackets && c != ']';
        if c == '-' && !in_brackets { '_' } else { c }
    };
    alias.chars().map(normal).collect()
}

/// The `key=value` strings of the `.modinfo` section.
fn modinfo(elf: &[u8]) -> Option<Vec<(String, String)>> {
    let elf = ElfFile64::<LittleEndian>::parse(elf).ok()?;
    let section = elf.section_by_name(".modinfo")?;
    let strings = section.data().ok()?.split(|&byte| byte == 0);
    let pairs = strings.filter_map(|string| {
        let text = String::from_utf8_lossy(string);
        let (key, value) = text.split_once('=')?;
        Some((key.to_owned(), value.to_owned()))
    });
    Some(pairs.collect())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A minimal module whose `.modinfo` holds `info`.
    pub(crate) fn module(info: &str) -> Vec<u8> {
        let names = b"\0.modinfo\0.shstrtab\0";
        let info = info.replace('\n', "\0");
        let names_at = 64 + info.len() as u64;
        let table_at = names_at + names.len() as u64;
        let mut elf = vec![0u8; 64];
        elf[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
        elf[0x14] = 1;
        elf[0x28..0x30].copy_from_slice(&table_at.to_le_bytes());
        elf[0x3a..0x3c].copy_from_slice(&64u16.to_le_bytes());
        elf[0x3c..0x3e].copy_from_slice(&3u16.to_le_bytes());
        elf[0x3e..0x40].copy_from_slice(&2u16.to_le_bytes());
        elf.extend_from_slice(info.as_bytes());
        elf.extend_from_slice(names);
        for (name, at, len) in [
            (0u32, 0, 0),
            (1, 64, info.len() as u64),
            (10, names_at, names.len() as u64),
        ] {
            let mut header = [0u8; 64];
            header[..4].copy_from_slice(&name.to_le_bytes());
            // SHT_PROGBITS, SHT_STRTAB
            header[4] = match name {
                0 => 0,
                1 => 1,
                _ => 3,
            };
            header[0x18..0x20].copy_from_slice(&u64::to_le_bytes(at));
            header[0x20..0x28].copy_from_slice(&u64::to_le_bytes(len));
            elf.extend_from_slice(&header);
        }
        elf
    }

    fn kernel() -> Modules {
        let mut modules = Modules::new("kernel/lib/crc16.ko\nkernel/drivers/dax/dax.ko\n");
        for (path, info) in [
            ("kernel/virtio/virtio.ko", "license=GPL\ndepends=\n"),
            ("kernel/virtio/virtio-ring.ko", "depends=virtio\n"),
            ("kernel/nvdimm/nd_pmem.ko", "depends=libnvdimm,dax\n"),
            ("kernel/nvdimm/libnvdimm.ko", "depends=virtio-ring\n"),
        ] {
            modules.add(path, &module(info)).unwrap();
        }
        modules
    }

    #[test]
    fn dependencies_come_first_and_built_in_ones_are_left_out() {
        let order = kernel().load_order(&["nd_pmem", "virtio"]).unwrap();
        assert_eq!(order, ["virtio", "virtio_ring", "libnvdimm", "nd_pmem"]);
        let [(_, text), ..] = kernel().lists().unwrap();
        let text = String::from_utf8(text).unwrap();
        let line = "kernel/nvdimm/nd_pmem.ko: kernel/nvdimm/libnvdimm.ko \
                    kernel/virtio/virtio-ring.ko kernel/virtio/virtio.ko\n";
        assert!(text.contains(line), "{text}");
        assert!(text.contains("kernel/virtio/virtio.ko:\n"), "{text}");
    }

    #[test]
    fn missing_and_circular_modules_are_errors() {
        let mut modules = kernel();
        modules.add("a.ko", &module("depends=b\n")).unwrap();
        let missing = modules.load_order(&["a"]).unwrap_err();
        assert!(missing.to_string().contains("needed by a"), "{missing}");
        modules.add("b.ko", &module("depends=a\n")).unwrap();
        let cycle = modules.load_order(&["a"]).unwrap_err();
        assert!(matches!(cycle, ModuleError::Cycle(_)));
    }

    #[test]
    fn damaged_modules_are_refused() {
        let good = module("depends=\n");
        for cut in 0..good.len() {
            assert!(Modules::new("").add("x.ko", &good[..cut]).is_err(), "{cut}");
        }
        let mut huge = good.clone();
        huge[0x28..0x30].fill(0xff);
        assert!(Modules::new("").add("x.ko", &huge).is_err());
    }
}
