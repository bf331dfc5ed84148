//! The ACPI tables (ACPI 6.5): processors, the PCI bus, power-off and reset, and what has no other way to be found.
//!
//! The machine is "hardware-reduced" (section 4.1): none of the fixed hardware of a PC. The DSDT is as small as it can be,
//! because the guest interprets it at every start.

use acpi_tables::aml::{self, Path};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, sdt::Sdt};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::layout;
use crate::legacy::power::{RESET_VALUE, SLEEP_TYPE_OFF};
use crate::virtio::device::GuestMemory;

const OEM_ID: [u8; 6] = *b"HULL  ";
const OEM_TABLE_ID: [u8; 8] = *b"HULLVMM ";
const OEM_REVISION: u32 = 1;
/// DSDT revision from which integers have 64 bits.
const DSDT_REVISION: u8 = 2;
/// `iapc_boot_arch` (section 5.2.9.3): no VGA to probe for, no CMOS clock, no 8042 (bit 1 clear).
const NO_VGA_NO_CMOS: u16 = 1 << 2 | 1 << 5;

/// Why the tables could not be written.
#[derive(Debug, thiserror::Error)]
pub enum AcpiError {
    /// They are larger than their place, which the number of processors should rule out.
    #[error("the ACPI tables need {0} bytes and have {room}", room = layout::ACPI_TABLES.end - layout::ACPI_TABLES.start)]
    TooLarge(usize),
    /// Guest memory is too small.
    #[error("cannot write the ACPI tables: {0}")]
    Memory(#[from] GuestMemoryError),
}

/// What the tables describe beside what every VM has.
#[derive(Clone, Copy, Debug)]
pub struct Machine {
    /// Processors, parked ones included.
    pub cpus: u8,
    /// Whether there is an I/O APIC.
    pub io_apic: bool,
}

/// Writes the tables and returns the address of the RSDP, where a kernel starts to read.
///
/// # Errors
///
/// When they do not fit.
pub fn write_tables(memory: &GuestMemory, machine: Machine) -> Result<u64, AcpiError> {
    let mut image = Image { bytes: Vec::with_capacity(2048) };
    // The RSDP comes first and points at the XSDT, whose place is not known yet.
    image.bytes.resize(Rsdp::len().next_multiple_of(8), 0);
    let dsdt = image.append(&dsdt());
    let fadt = image.append(&fadt(dsdt));
    let madt = image.append(&madt(machine));
    let mcfg = image.append(&mcfg());
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    for table in [fadt, madt, mcfg] {
        xsdt.add_entry(table);
    }
    let xsdt = image.append(&xsdt);
    let mut rsdp = Vec::new();
    Rsdp::new(OEM_ID, xsdt).to_aml_bytes(&mut rsdp);
    image.bytes[..rsdp.len()].copy_from_slice(&rsdp);

    let room = (layout::ACPI_TABLES.end - layout::ACPI_TABLES.start) as usize;
    if image.bytes.len() > room {
        return Err(AcpiError::TooLarge(image.bytes.len()));
    }
    memory.write_slice(&image.bytes, GuestAddress(layout::ACPI_TABLES.start))?;
    Ok(layout::ACPI_TABLES.start)
}

/// The tables as they come to lie from [`layout::ACPI_TABLES`] on.
struct Image {
    bytes: Vec<u8>,
}

impl Image {
    /// Adds a table and returns its address.
    fn append(&mut self, table: &dyn Aml) -> u64 {
        let address = layout::ACPI_TABLES.start + self.bytes.len() as u64;
        table.to_aml_bytes(&mut self.bytes);
        self.bytes.resize(self.bytes.len().next_multiple_of(8), 0);
        address
    }
}

fn port(port: u16) -> GAS {
    GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, u64::from(port))
}

/// Fixed ACPI description table (section 5.2.9).
fn fadt(dsdt: u64) -> impl Aml {
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::Wbinvd)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::ResetRegSup);
    fadt.iapc_boot_arch = NO_VGA_NO_CMOS.into();
    fadt.reset_reg = port(layout::PORT_RESET);
    fadt.reset_value = RESET_VALUE;
    fadt.sleep_control_reg = port(layout::PORT_SLEEP_CONTROL);
    fadt.sleep_status_reg = port(layout::PORT_SLEEP_STATUS);
    fadt.hypervisor_vendor_identity = u64::from_le_bytes(*b"HULL\0\0\0\0").into();
    fadt.finalize()
}

/// Multiple APIC description table (section 5.2.12).
fn madt(machine: Machine) -> impl Aml {
    // The address is below 4 GiB.
    let address = LocalInterruptController::Address(layout::LOCAL_APIC as u32);
    let mut madt = MADT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION, address);
    for cpu in 0..machine.cpus {
        madt.add_structure(ProcessorLocalApic::new(cpu, cpu, EnabledStatus::Enabled));
    }
    if machine.io_apic {
        madt.add_structure(IoApic::new(0, layout::IO_APIC as u32, 0));
    }
    madt
}

/// Memory-mapped configuration table (PCI firmware specification 3.3, section 4.1.2).
fn mcfg() -> impl Aml {
    let mut mcfg = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    mcfg.add_ecam(layout::PCI_ECAM.start, 0, 0, 0);
    mcfg
}

/// Differentiated system description table (section 5.2.11.1).
fn dsdt() -> impl Aml {
    let mut sdt = Sdt::new(*b"DSDT", 36, DSDT_REVISION, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    let mut code = Vec::new();
    // \_S5: what to write to the sleep control register to power off.
    aml::Name::new("_S5_".into(), &aml::Package::new(vec![&SLEEP_TYPE_OFF])).to_aml_bytes(&mut code);
    let devices: [&dyn Aml; 4] = [&PciBus, &EcamReservation, &PanicDevice, &GenerationId];
    aml::Scope::new("_SB_".into(), devices.to_vec()).to_aml_bytes(&mut code);
    sdt.append_slice(&code);
    sdt
}

/// The PCI host bridge: one bus, one window for base address registers.
struct PciBus;

impl Aml for PciBus {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        // The window lies below 4 GiB.
        let (first, last) = (layout::PCI_BARS.start as u32, (layout::PCI_BARS.end - 1) as u32);
        aml::Device::new(
            Path::new("PCI0"),
            vec![
                &aml::Name::new("_HID".into(), &aml::EISAName::new("PNP0A08")),
                &aml::Name::new("_CID".into(), &aml::EISAName::new("PNP0A03")),
                &aml::Name::new(
                    "_CRS".into(),
                    &aml::ResourceTemplate::new(vec![
                        &aml::AddressSpace::new_bus_number(0u16, 0u16),
                        &aml::AddressSpace::new_memory(
                            aml::AddressSpaceCacheable::NotCacheable,
                            true,
                            first,
                            last,
                            None,
                        ),
                    ]),
                ),
            ],
        )
        .to_aml_bytes(sink);
    }
}

/// A motherboard resource that claims configuration space: Linux does not trust the MCFG without it
/// (`pci_mmcfg_check_reserved`).
struct EcamReservation;

impl Aml for EcamReservation {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        let (base, len) = (layout::PCI_ECAM.start as u32, (layout::PCI_ECAM.end - layout::PCI_ECAM.start) as u32);
        aml::Device::new(
            Path::new("ECAM"),
            vec![
                &aml::Name::new("_HID".into(), &aml::EISAName::new("PNP0C02")),
                &aml::Name::new(
                    "_CRS".into(),
                    &aml::ResourceTemplate::new(vec![&aml::Memory32Fixed::new(true, base, len)]),
                ),
            ],
        )
        .to_aml_bytes(sink);
    }
}

/// The panic device (QEMU's docs/specs/pvpanic.rst).
struct PanicDevice;

impl Aml for PanicDevice {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        aml::Device::new(
            Path::new("PEVT"),
            vec![
                &aml::Name::new("_HID".into(), &"QEMU0001"),
                &aml::Name::new(
                    "_CRS".into(),
                    &aml::ResourceTemplate::new(vec![&aml::IO::new(layout::PORT_PVPANIC, layout::PORT_PVPANIC, 1, 1)]),
                ),
            ],
        )
        .to_aml_bytes(sink);
    }
}

/// The VM generation ID (Microsoft, "Virtual Machine Generation ID", 2012).
struct GenerationId;

impl Aml for GenerationId {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        let (low, high) = (layout::VM_GENERATION_ID as u32, 0u32);
        aml::Device::new(
            Path::new("VGEN"),
            vec![
                &aml::Name::new("_HID".into(), &"HULLVGID"),
                &aml::Name::new("_CID".into(), &"VM_Gen_Counter"),
                &aml::Name::new("_DDN".into(), &"VM_Gen_Counter"),
                &aml::Name::new("ADDR".into(), &aml::Package::new(vec![&low, &high])),
            ],
        )
        .to_aml_bytes(sink);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::allocate;

    fn table(memory: &GuestMemory, address: u64) -> Vec<u8> {
        let len: u32 = memory.read_obj(GuestAddress(address + 4)).unwrap();
        let mut bytes = vec![0; len as usize];
        memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    #[test]
    fn every_table_is_reachable_and_sums_to_zero() {
        let memory = allocate(32 << 20).unwrap();
        let rsdp = write_tables(&memory, Machine { cpus: 64, io_apic: true }).unwrap();
        let mut bytes = [0; 36];
        memory.read_slice(&mut bytes, GuestAddress(rsdp)).unwrap();
        assert_eq!((sum(&bytes[..20]), sum(&bytes)), (0, 0));
        let xsdt = table(&memory, u64::from_le_bytes(bytes[24..32].try_into().unwrap()));
        assert_eq!((&xsdt[..4], sum(&xsdt)), (b"XSDT".as_slice(), 0));
        let tables: Vec<_> = xsdt[36..]
            .chunks_exact(8)
            .map(|entry| table(&memory, u64::from_le_bytes(entry.try_into().unwrap())))
            .collect();
        let names: Vec<_> = tables.iter().map(|t| std::str::from_utf8(&t[..4]).unwrap()).collect();
        assert_eq!(names, ["FACP", "APIC", "MCFG"]);
        assert!(tables.iter().all(|table| sum(table) == 0));
        let dsdt = table(&memory, u64::from_le_bytes(tables[0][140..148].try_into().unwrap()));
        assert_eq!((&dsdt[..4], sum(&dsdt)), (b"DSDT".as_slice(), 0));
    }

    #[test]
    fn the_madt_lists_every_processor() {
        let mut bytes = Vec::new();
        madt(Machine { cpus: 3, io_apic: false }).to_aml_bytes(&mut bytes);
        assert_eq!(bytes.len(), 44 + 3 * 8);
        assert_eq!(&bytes[44..52], [0, 8, 0, 0, 1, 0, 0, 0]);
    }
}
