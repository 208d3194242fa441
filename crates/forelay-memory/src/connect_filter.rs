//! Where the processes of a control group may connect to: not to the host itself.
//!
//! QEMU's user network shows a guest the host's loopback as its gateway, and has no option
//! against it. So the kernel refuses: small programs on the group (cgroup v2, any controllers)
//! look at each address that a process in it connects or sends to. What others connect to in
//! the group is not touched, nor what goes elsewhere.
//!
//! An address of the host's that is no loopback address is like any other: what listens there
//! can be reached from outside as well.

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd};
use std::path::Path;

use rustix::fs::{Mode, OFlags};

/// What is let through to the host's loopback addresses all the same.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ConnectFilter {
    /// Name servers, on port 53.
    pub resolvers: Vec<Ipv4Addr>,
    /// UDP ports of the group's own: what is sent from them answers somebody who sent there.
    pub udp_ports: Vec<u16>,
}

/// `struct bpf_insn`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Instruction {
    code: u8,
    /// Destination in the low half, source in the high one.
    registers: u8,
    offset: i16,
    immediate: i32,
}

// Classes, sizes and operations of linux/bpf.h that are used.
const LOAD_WORD: u8 = 0x61;
const LOAD_DOUBLE: u8 = 0x79;
const MOVE: u8 = 0xbf;
const SET: u8 = 0xb7;
const AND: u8 = 0x57;
const JUMP_EQUAL: u8 = 0x15;
const JUMP_NOT_EQUAL_32: u8 = 0x56;
const EXIT: u8 = 0x95;

const fn instruction(code: u8, registers: (u8, u8), offset: i16, immediate: i32) -> Instruction {
    let (destination, source) = registers;
    Instruction {
        code,
        registers: destination | source << 4,
        offset,
        immediate,
    }
}

/// Ends the program: 1 lets the call through, 0 refuses it.
const fn verdict(verdict: i32) -> [Instruction; 2] {
    [
        instruction(SET, (0, 0), 0, verdict),
        instruction(EXIT, (0, 0), 0, 0),
    ]
}

/// Where the kernel shows a program to its calls: `enum bpf_attach_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Call {
    Connect4 = 10,
    Connect6 = 11,
    Send4 = 14,
    Send6 = 15,
}

impl ConnectFilter {
    /// Puts the filter on a group of cgroup v2, for as long as the group is there.
    pub fn attach(&self, group: &Path) -> io::Result<()> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let group = rustix::fs::open(group, flags, Mode::empty())?;
        for (call, program) in [
            (Call::Connect4, self.program(false)),
            (Call::Send4, self.program(true)),
            // QEMU's user network is told to have no IPv6.
            (Call::Connect6, verdict(0).to_vec()),
            (Call::Send6, verdict(0).to_vec()),
        ] {
            let program = load(&program, call)?;
            put_on(&group, &program, call)?;
        }
        Ok(())
    }

    /// `struct bpf_sock_addr` is in register 1: address at 4, port at 24, both as they are on
    /// the wire, the socket at 64, which has its own port, as a number, at 44.
    fn program(&self, sends: bool) -> Vec<Instruction> {
        const ADDRESS: u8 = 2;
        const SCRATCH: u8 = 3;
        const SOCKET: u8 = 4;
        // 127.0.0.0/8, and 0.0.0.0/8, by which Linux means itself, too.
        let mut program = vec![
            instruction(LOAD_WORD, (ADDRESS, 1), 4, 0),
            instruction(MOVE, (SCRATCH, ADDRESS), 0, 0),
            instruction(AND, (SCRATCH, 0), 0, first_octet_mask()),
            instruction(
                JUMP_EQUAL,
                (SCRATCH, 0),
                3,
                on_wire(Ipv4Addr::new(127, 0, 0, 0)),
            ),
            instruction(JUMP_EQUAL, (SCRATCH, 0), 2, 0),
        ];
        program.extend(verdict(1));
        program.push(instruction(LOAD_WORD, (SCRATCH, 1), 24, 0));
        for resolver in &self.resolvers {
            let domain = i32::from(53u16.to_be());
            program.extend([
                instruction(JUMP_NOT_EQUAL_32, (ADDRESS, 0), 3, on_wire(*resolver)),
                instruction(JUMP_NOT_EQUAL_32, (SCRATCH, 0), 2, domain),
            ]);
            program.extend(verdict(1));
        }
        if sends && !self.udp_ports.is_empty() {
            program.push(instruction(LOAD_DOUBLE, (SOCKET, 1), 64, 0));
            program.push(instruction(LOAD_WORD, (SCRATCH, SOCKET), 44, 0));
            for port in &self.udp_ports {
                program.push(instruction(
                    JUMP_NOT_EQUAL_32,
                    (SCRATCH, 0),
                    2,
                    i32::from(*port),
                ));
                program.extend(verdict(1));
            }
        }
        program.extend(verdict(0));
        program
    }
}

fn on_wire(address: Ipv4Addr) -> i32 {
    i32::from_ne_bytes(address.octets())
}

fn first_octet_mask() -> i32 {
    on_wire(Ipv4Addr::new(255, 0, 0, 0))
}

/// `union bpf_attr` of loading a program, as far as it is used.
#[repr(C)]
#[derive(Default)]
struct LoadAttributes {
    kind: u32,
    instructions: u32,
    program: u64,
    licence: u64,
    log_level: u32,
    log_bytes: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
    interface: u32,
    call: u32,
}

/// `union bpf_attr` of attaching one.
#[repr(C)]
struct AttachAttributes {
    group: RawFd,
    program: RawFd,
    call: u32,
    flags: u32,
}

fn bpf<T>(command: libc::c_int, attributes: &T) -> io::Result<RawFd> {
    // SAFETY: the kernel reads as many bytes as `attributes` has, and what they point to.
    let result = unsafe {
        let attributes = std::ptr::from_ref(attributes);
        libc::syscall(libc::SYS_bpf, command, attributes, size_of::<T>())
    };
    match RawFd::try_from(result) {
        Ok(result @ 0..) => Ok(result),
        _ => Err(io::Error::last_os_error()),
    }
}

fn load(program: &[Instruction], call: Call) -> io::Result<OwnedFd> {
    const LOAD: libc::c_int = 5;
    const SOCKET_ADDRESS: u32 = 18;
    let attributes = LoadAttributes {
        kind: SOCKET_ADDRESS,
        instructions: program.len() as u32,
        program: program.as_ptr() as u64,
        licence: c"Apache-2.0".as_ptr() as u64,
        call: call as u32,
        ..LoadAttributes::default()
    };
    let fd = bpf(LOAD, &attributes)?;
    // SAFETY: a new descriptor (closed by exec) that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn put_on(group: &OwnedFd, program: &OwnedFd, call: Call) -> io::Result<()> {
    const ATTACH: libc::c_int = 8;
    // Beside those of groups around it and within it.
    const ALLOW_MULTI: u32 = 2;
    let attributes = AttachAttributes {
        group: group.as_raw_fd(),
        program: program.as_raw_fd(),
        call: call as u32,
        flags: ALLOW_MULTI,
    };
    bpf(ATTACH, &attributes).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs a program as the kernel would: address and port of the call, port of the socket.
    fn let_through(program: &[Instruction], address: [u8; 4], port: u16, own: u16) -> bool {
        let mut registers = [0u64; 11];
        let mut at = 0;
        loop {
            let step = program[at];
            at += 1;
            let (to, from) = (
                usize::from(step.registers & 15),
                usize::from(step.registers >> 4),
            );
            let immediate = i64::from(step.immediate) as u64;
            let jump = match step.code {
                LOAD_WORD => {
                    registers[to] = match (from, step.offset) {
                        (1, 4) => u32::from_ne_bytes(address).into(),
                        (1, 24) => port.to_be().into(),
                        (4, 44) => own.into(),
                        other => panic!("load of {other:?}"),
                    };
                    false
                }
                LOAD_DOUBLE => false,
                MOVE => {
                    registers[to] = registers[from];
                    false
                }
                SET => {
                    registers[to] = immediate;
                    false
                }
                AND => {
                    registers[to] &= immediate;
                    false
                }
                JUMP_EQUAL => registers[to] == immediate,
                JUMP_NOT_EQUAL_32 => registers[to] as u32 != immediate as u32,
                EXIT => return registers[0] == 1,
                other => panic!("instruction {other:#x}"),
            };
            if jump {
                at += step.offset as usize;
            }
        }
    }

    #[test]
    fn loopback_is_refused_but_for_the_resolver_and_answers_from_own_ports() {
        let filter = ConnectFilter {
            resolvers: vec![Ipv4Addr::new(127, 0, 0, 53), Ipv4Addr::new(127, 0, 0, 200)],
            udp_ports: vec![5353, 40_000],
        };
        for sends in [false, true] {
            let program = filter.program(sends);
            let call = |address, port, own| let_through(&program, address, port, own);
            for address in [[127, 0, 0, 1], [127, 255, 0, 9], [0, 0, 0, 0], [0, 9, 9, 9]] {
                assert!(
                    !call(address, 80, 1234) && !call(address, 53, 1234),
                    "{address:?}"
                );
                assert_eq!(call(address, 80, 40_000), sends);
            }
            for address in [
                [10, 0, 2, 2],
                [192, 168, 0, 127],
                [255, 255, 255, 255],
                [1, 0, 0, 127],
            ] {
                assert!(call(address, 80, 1234), "{address:?}");
            }
            for resolver in [[127, 0, 0, 53], [127, 0, 0, 200]] {
                assert!(call(resolver, 53, 1234) && !call(resolver, 80, 1234));
            }
        }
        let none = ConnectFilter::default();
        assert!(!let_through(
            &none.program(true),
            [127, 0, 0, 53],
            53,
            40_000
        ));
    }
}
