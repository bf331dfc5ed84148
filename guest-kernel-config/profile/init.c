/* The probe's /init: says how many instructions it took to get here and how much memory is in use, and ends the VM. */
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <unistd.h>

int main(void)
{
	/* With -icount shift=0 the TSC counts instructions since the machine was switched on. */
	unsigned long tsc = __builtin_ia32_rdtsc();
	char line[256];

	mkdir("/proc", 0755);
	mount("proc", "/proc", "proc", 0, NULL);
	printf("instructions since power-on: %lu\n", tsc);
	for (FILE *file = fopen("/proc/meminfo", "r"); file && fgets(line, sizeof(line), file);)
		if (!strncmp(line, "MemTotal", 8) || !strncmp(line, "MemFree", 7) || !strncmp(line, "Slab", 4) ||
		    !strncmp(line, "Percpu", 6) || !strncmp(line, "PageTables", 10))
			fputs(line, stdout);
	fflush(stdout);
	reboot(RB_AUTOBOOT);
	return 1;
}
