//! Which devices a container may use: `linux.resources.devices`, as an eBPF program on its cgroup.
//!
//! The specification's rules are a history: each allows or denies something on top of those before it. Here they are
//! first folded into a default and its exceptions, then written as a program that looks through the exceptions.

use std::os::fd::{AsFd, OwnedFd};

use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType};

use super::Cgroup;
use crate::error::{Error, Result, Step};
use crate::sys::{BpfInstruction, bpf_attach_device_program, bpf_detach_device_program, bpf_load_device_program};

/// Ways to use a device, as `<linux/bpf.h>` numbers them.
const MAKE: u8 = 1;
const READ: u8 = 2;
const WRITE: u8 = 4;
const ALL: u8 = MAKE | READ | WRITE;

/// `BPF_DEVCG_DEV_BLOCK` and `BPF_DEVCG_DEV_CHAR`.
const BLOCK: u8 = 1;
const CHARACTER: u8 = 2;

/// Every container may use these, whatever the rules: the nodes that runtimes make in each /dev, pseudo-terminals,
/// and making nodes, which gives no use of them.
const ALWAYS: [(u8, Option<u32>, Option<u32>, u8); 10] = [
    (CHARACTER, None, None, MAKE),
    (BLOCK, None, None, MAKE),
    (CHARACTER, Some(1), Some(3), ALL),
    (CHARACTER, Some(1), Some(5), ALL),
    (CHARACTER, Some(1), Some(7), ALL),
    (CHARACTER, Some(1), Some(8), ALL),
    (CHARACTER, Some(1), Some(9), ALL),
    (CHARACTER, Some(5), Some(0), ALL),
    (CHARACTER, Some(5), Some(2), ALL),
    (CHARACTER, Some(136), None, ALL),
];

/// Longest list of exceptions: seven instructions each, and a program of 4,096 loads on any kernel.
const MAX_EXCEPTIONS: usize = 512;

/// Some devices; `None` stands for any number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Devices {
    kind: u8,
    major: Option<u32>,
    minor: Option<u32>,
}

/// The rules folded: what goes for all devices, and the accesses for which the opposite goes.
#[derive(Debug, PartialEq, Eq)]
struct Policy {
    allow: bool,
    exceptions: Vec<(Devices, u8)>,
}

/// A program on a cgroup, so that an update can take it back.
#[derive(Debug)]
pub(crate) struct Attached(OwnedFd);

/// Has the rules decide for the cgroup, in place of those of `before`.
pub(crate) fn apply(
    cgroup: &Cgroup,
    rules: &[LinuxDeviceCgroup],
    before: Option<&Attached>,
) -> Result<Option<Attached>> {
    let policy = Policy::of(rules)?;
    let directory = cgroup.open().step("open the cgroup")?;
    // All is allowed: no program is needed to say so.
    let attached = if policy.allow && policy.exceptions.is_empty() {
        None
    } else {
        let program = bpf_load_device_program(&policy.program()).step("linux.resources.devices: load the program")?;
        // The new one before the old one goes: both have to allow, so nothing slips through between.
        bpf_attach_device_program(directory.as_fd(), program.as_fd())
            .step("linux.resources.devices: attach the program")?;
        Some(Attached(program))
    };
    if let Some(Attached(program)) = before {
        bpf_detach_device_program(directory.as_fd(), program.as_fd())
            .step("linux.resources.devices: detach the program")?;
    }
    Ok(attached)
}

impl Policy {
    fn of(rules: &[LinuxDeviceCgroup]) -> Result<Self> {
        let mut policy = Self { allow: false, exceptions: Vec::new() };
        for rule in rules {
            let access = access_of(rule)?;
            let number = |number: Option<i64>, name: &str| match number {
                None | Some(-1) => Ok(None),
                Some(number) => u32::try_from(number)
                    .map(Some)
                    .map_err(|_| Error::invalid(format!("linux.resources.devices.{name}"), "is out of range")),
            };
            let (major, minor) = (number(rule.major(), "major")?, number(rule.minor(), "minor")?);
            let kinds: &[u8] = match rule.typ() {
                None | Some(LinuxDeviceType::A) => {
                    if major.is_none() && minor.is_none() && access == ALL {
                        policy = Self { allow: rule.allow(), exceptions: Vec::new() };
                        continue;
                    }
                    &[BLOCK, CHARACTER]
                }
                Some(LinuxDeviceType::B) => &[BLOCK],
                Some(LinuxDeviceType::C | LinuxDeviceType::U) => &[CHARACTER],
                Some(LinuxDeviceType::P) => {
                    return Err(Error::invalid("linux.resources.devices.type", "a FIFO is not a device"));
                }
            };
            for kind in kinds {
                policy.add(rule.allow(), Devices { kind: *kind, major, minor }, access);
            }
        }
        for (kind, major, minor, access) in ALWAYS {
            policy.add(true, Devices { kind, major, minor }, access);
        }
        if policy.exceptions.len() > MAX_EXCEPTIONS {
            return Err(Error::invalid("linux.resources.devices", "too many rules"));
        }
        Ok(policy)
    }

    fn add(&mut self, allow: bool, devices: Devices, access: u8) {
        let known = self.exceptions.iter_mut().find(|(known, _)| *known == devices);
        match (allow == self.allow, known) {
            (false, Some((_, accesses))) => *accesses |= access,
            (false, None) => self.exceptions.push((devices, access)),
            (true, Some((_, accesses))) => *accesses &= !access,
            (true, None) => {}
        }
        self.exceptions.retain(|(_, accesses)| *accesses != 0);
    }

    /// The policy for the kernel: reads a `bpf_cgroup_dev_ctx`, returns 1 to allow and 0 to deny.
    fn program(&self) -> Vec<BpfInstruction> {
        // The context's first word has the kind in its low half and the access in its high half.
        let mut program =
            vec![load(2, 1, 0), copy(3, 2), and(2, 0xffff), shift_right(3, 16), load(4, 1, 4), load(5, 1, 8)];
        for (devices, access) in &self.exceptions {
            let mut checks = vec![jump_unless_equal(2, i32::from(devices.kind))];
            if self.allow {
                // Denied is whoever wants any of these accesses.
                checks.extend([copy(0, 3), and(0, i32::from(*access)), jump_if_equal(0, 0)]);
            } else if *access != ALL {
                // Allowed is who wants none but these accesses.
                checks.extend([copy(0, 3), and(0, i32::from(!access & ALL)), jump_unless_equal(0, 0)]);
            }
            checks.extend(devices.major.map(|major| jump_unless_equal(4, major as i32)));
            checks.extend(devices.minor.map(|minor| jump_unless_equal(5, minor as i32)));
            let verdict = [set(0, i32::from(!self.allow)), EXIT];
            // Every jump leads behind the verdict.
            let end = checks.len() + verdict.len();
            for (position, check) in checks.iter_mut().enumerate() {
                if check.offset != 0 {
                    check.offset = (end - position - 1) as i16;
                }
            }
            program.extend(checks);
            program.extend(verdict);
        }
        program.extend([set(0, i32::from(self.allow)), EXIT]);
        program
    }
}

fn access_of(rule: &LinuxDeviceCgroup) -> Result<u8> {
    let Some(text) = rule.access().as_deref().filter(|text| !text.is_empty()) else {
        return Ok(ALL);
    };
    text.bytes().try_fold(0, |access, letter| match letter {
        b'r' => Ok(access | READ),
        b'w' => Ok(access | WRITE),
        b'm' => Ok(access | MAKE),
        _ => Err(Error::invalid("linux.resources.devices.access", format!("{text:?} has letters other than rwm"))),
    })
}

// Instructions, by the tables of the kernel's Documentation/bpf/standardization/instruction-set.rst. A jump's offset
// is filled in later; until then it is 1, which tells it from what is no jump.

const EXIT: BpfInstruction = BpfInstruction { code: 0x95, registers: 0, offset: 0, immediate: 0 };

const fn instruction(code: u8, to: u8, from: u8, offset: i16, immediate: i32) -> BpfInstruction {
    BpfInstruction { code, registers: from << 4 | to, offset, immediate }
}

/// `to = *(u32 *)(from + offset)`
const fn load(to: u8, from: u8, offset: i16) -> BpfInstruction {
    BpfInstruction { code: 0x61, registers: from << 4 | to, offset, immediate: 0 }
}

const fn copy(to: u8, from: u8) -> BpfInstruction {
    instruction(0xbc, to, from, 0, 0)
}

const fn set(to: u8, value: i32) -> BpfInstruction {
    instruction(0xb4, to, 0, 0, value)
}

const fn and(to: u8, mask: i32) -> BpfInstruction {
    instruction(0x54, to, 0, 0, mask)
}

const fn shift_right(to: u8, bits: i32) -> BpfInstruction {
    instruction(0x74, to, 0, 0, bits)
}

const fn jump_if_equal(register: u8, value: i32) -> BpfInstruction {
    instruction(0x16, register, 0, 1, value)
}

const fn jump_unless_equal(register: u8, value: i32) -> BpfInstruction {
    instruction(0x56, register, 0, 1, value)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn policy(json: &str) -> Policy {
        Policy::of(&serde_json::from_str::<Vec<LinuxDeviceCgroup>>(json).unwrap()).unwrap()
    }

    /// Runs a program as the kernel would, as far as these programs go.
    fn verdict(program: &[BpfInstruction], kind: u8, access: u8, major: u32, minor: u32) -> bool {
        let context = [u32::from(access) << 16 | u32::from(kind), major, minor];
        let mut registers = [0_u32; 11];
        let mut position = 0;
        loop {
            let BpfInstruction { code, registers: pair, offset, immediate } = program[position];
            let (to, from) = ((pair & 15) as usize, (pair >> 4) as usize);
            position += 1;
            let mut jump = false;
            match code {
                0x61 => registers[to] = context[offset as usize / 4],
                0xbc => registers[to] = registers[from],
                0xb4 => registers[to] = immediate as u32,
                0x54 => registers[to] &= immediate as u32,
                0x74 => registers[to] >>= immediate,
                0x16 => jump = registers[to] == immediate as u32,
                0x56 => jump = registers[to] != immediate as u32,
                0x95 => return registers[0] == 1,
                other => panic!("instruction {other:#x}"),
            }
            if jump {
                position += offset as usize;
            }
        }
    }

    #[test]
    fn without_rules_only_the_usual_devices_work() {
        let program = policy("[]").program();
        assert!(verdict(&program, CHARACTER, READ | WRITE, 1, 3));
        assert!(verdict(&program, CHARACTER, READ, 136, 40));
        assert!(verdict(&program, BLOCK, MAKE, 253, 0));
        assert!(!verdict(&program, BLOCK, READ, 253, 0));
        assert!(!verdict(&program, CHARACTER, READ | MAKE, 10, 232));
    }

    #[test]
    fn later_rules_change_earlier_ones() {
        let rules = r#"[{"allow":false,"access":"rwm"},
            {"allow":true,"type":"c","major":10,"minor":232,"access":"rw"},
            {"allow":false,"type":"c","major":10,"minor":232,"access":"w"}]"#;
        let program = policy(rules).program();
        assert!(verdict(&program, CHARACTER, READ, 10, 232));
        assert!(!verdict(&program, CHARACTER, READ | WRITE, 10, 232));
    }

    #[test]
    fn a_privileged_container_needs_no_program() {
        let policy = policy(r#"[{"allow":false,"access":"rwm"},{"allow":true,"access":"rwm"}]"#);
        assert_eq!(policy, Policy { allow: true, exceptions: Vec::new() });
    }

    #[test]
    fn exceptions_to_everything_deny() {
        let rules = r#"[{"allow":true,"access":"rwm"},{"allow":false,"type":"b","major":8,"access":"w"}]"#;
        let program = policy(rules).program();
        assert!(verdict(&program, BLOCK, READ, 8, 1));
        assert!(!verdict(&program, BLOCK, READ | WRITE, 8, 1));
        assert!(verdict(&program, CHARACTER, WRITE, 8, 1));
    }

    #[test]
    fn nonsense_is_refused_by_name() {
        let refused = |json: &str| match Policy::of(&serde_json::from_str::<Vec<LinuxDeviceCgroup>>(json).unwrap()) {
            Err(Error::Invalid { field, .. }) => field.into_owned(),
            other => panic!("{other:?}"),
        };
        assert_eq!(refused(r#"[{"allow":true,"access":"rx"}]"#), "linux.resources.devices.access");
        assert_eq!(refused(r#"[{"allow":true,"major":-5}]"#), "linux.resources.devices.major");
    }

    proptest! {
        #[test]
        fn the_program_says_what_the_policy_says(
            allow in any::<bool>(),
            exceptions in proptest::collection::vec(
                (1_u8..=2, proptest::option::of(0_u32..4), proptest::option::of(0_u32..4), 1_u8..=7), 0..6),
            kind in 1_u8..=2, access in 1_u8..=7, major in 0_u32..4, minor in 0_u32..4,
        ) {
            let exceptions: Vec<_> = exceptions
                .into_iter()
                .map(|(kind, major, minor, access)| (Devices { kind, major, minor }, access))
                .collect();
            let excepted = exceptions.iter().any(|(devices, accesses)| {
                devices.kind == kind
                    && devices.major.is_none_or(|known| known == major)
                    && devices.minor.is_none_or(|known| known == minor)
                    && if allow { access & accesses != 0 } else { access & !accesses == 0 }
            });
            let policy = Policy { allow, exceptions };
            prop_assert_eq!(verdict(&policy.program(), kind, access, major, minor), allow != excepted);
        }
    }
}
