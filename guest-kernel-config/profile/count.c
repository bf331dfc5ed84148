/*
 * A QEMU TCG plugin that counts the instructions a guest kernel executes, by phase of its boot and by function.
 *
 * Arguments: map=System.map, phases=FILE (one function name a line), out=FILE. A phase begins when its function is
 * entered and ends where the next one begins; so what an interrupt or a kernel thread does counts for the phase
 * that it interrupts. Output: lines "PHASE FUNCTION COUNT".
 *
 * The few declarations below stand for qemu-plugin.h (API version 4, QEMU 9.2 and later), which Debian does not
 * package.
 */
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))
struct qemu_plugin_tb;
struct qemu_plugin_insn;
struct qemu_info_t;
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *);
struct qemu_plugin_insn *qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *, size_t);
uint64_t qemu_plugin_insn_vaddr(const struct qemu_plugin_insn *);
void qemu_plugin_register_vcpu_tb_trans_cb(uint64_t, void (*)(uint64_t, struct qemu_plugin_tb *));
void qemu_plugin_register_vcpu_insn_exec_cb(struct qemu_plugin_insn *, void (*)(unsigned, void *), int, void *);
void qemu_plugin_register_atexit_cb(uint64_t, void (*)(uint64_t, void *), void *);
EXPORT int qemu_plugin_version = 4;

enum { MAX_FUNCTIONS = 200000, MAX_PHASES = 2000, NAME_BYTES = 128 };

static struct function {
	uint64_t address;
	char name[NAME_BYTES];
	int phase; /* that begins here, or 0 */
} *functions;
static size_t function_count;

static char phase_names[MAX_PHASES][NAME_BYTES] = { "before_the_kernel" };
static size_t phase_count = 1;
static uint32_t *counts; /* [phase][function] */
static size_t current;
static char *out;

static void on_insn(unsigned vcpu, void *function)
{
	counts[current * MAX_FUNCTIONS + (size_t)function]++;
}

static void on_entry(unsigned vcpu, void *function)
{
	current = functions[(size_t)function].phase;
	on_insn(vcpu, function);
}

/* System.map is sorted by address. */
static size_t function_at(uint64_t address)
{
	size_t low = 0, high = function_count;

	while (high - low > 1) {
		size_t middle = (low + high) / 2;

		if (functions[middle].address <= address)
			low = middle;
		else
			high = middle;
	}
	return low;
}

static void on_translate(uint64_t id, struct qemu_plugin_tb *tb)
{
	for (size_t i = 0; i < qemu_plugin_tb_n_insns(tb); i++) {
		struct qemu_plugin_insn *insn = qemu_plugin_tb_get_insn(tb, i);
		uint64_t address = qemu_plugin_insn_vaddr(insn);
		size_t function = function_at(address);
		bool entry = functions[function].phase && functions[function].address == address;

		qemu_plugin_register_vcpu_insn_exec_cb(insn, entry ? on_entry : on_insn, 0, (void *)function);
	}
}

static void on_exit_(uint64_t id, void *unused)
{
	FILE *file = fopen(out, "w");

	for (size_t p = 0; p < phase_count; p++)
		for (size_t f = 0; f < function_count; f++)
			if (counts[p * MAX_FUNCTIONS + f])
				fprintf(file, "%s %s %u\n", phase_names[p], functions[f].name,
					counts[p * MAX_FUNCTIONS + f]);
	fclose(file);
}

static void read_map(const char *path)
{
	FILE *file = fopen(path, "r");
	struct function f = { 0 };
	char type;

	/* Below the kernel: firmware, user space, and the kernel before it turned to its own addresses. */
	strcpy(functions[function_count++].name, "(low_addresses)");
	while (file && fscanf(file, "%lx %c %127s", &f.address, &type, f.name) == 3)
		if (f.address >= 0xffffffff80000000 && function_count < MAX_FUNCTIONS)
			functions[function_count++] = f;
}

static void read_phases(const char *path)
{
	FILE *file = fopen(path, "r");
	char name[NAME_BYTES];

	while (file && phase_count < MAX_PHASES && fscanf(file, "%127s", name) == 1)
		for (size_t f = 1; f < function_count; f++)
			if (!functions[f].phase && !strcmp(functions[f].name, name)) {
				strcpy(phase_names[phase_count], name);
				functions[f].phase = phase_count++;
				break;
			}
}

EXPORT int qemu_plugin_install(uint64_t id, const struct qemu_info_t *info, int argc, char **argv)
{
	functions = calloc(MAX_FUNCTIONS, sizeof(*functions));
	counts = calloc((size_t)MAX_PHASES * MAX_FUNCTIONS, sizeof(*counts));
	for (int i = 0; i < argc; i++) {
		if (!strncmp(argv[i], "map=", 4))
			read_map(argv[i] + 4);
		else if (!strncmp(argv[i], "phases=", 7))
			read_phases(argv[i] + 7);
		else if (!strncmp(argv[i], "out=", 4))
			out = strdup(argv[i] + 4);
	}
	if (!out || function_count < 2)
		return 1;
	qemu_plugin_register_vcpu_tb_trans_cb(id, on_translate);
	qemu_plugin_register_atexit_cb(id, on_exit_, NULL);
	return 0;
}
