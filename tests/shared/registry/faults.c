/* Counts the file operations below one folder, makes the n-th one fail or end the process, and logs all of them.

   Loaded by LD_PRELOAD before libc; `faults.py` controls it and documents the log. For one thread. */

#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum mode { COUNT = 0, FAIL_ONCE = 1, FAIL_ON = 2, DIE = 3 };
enum { PATH_BYTES = 4096, DEATH = 86 };

static char root[PATH_BYTES];
static long operations, target;
static enum mode mode;
static int error_number, log_descriptor = -1;
static char hit_name[32];

void faults_arm(const char *folder, long n, int how, int error) {
  snprintf(root, sizeof root, "%s", folder);
  operations = 0, target = n, mode = how, error_number = error;
  hit_name[0] = 0;
}

void faults_disarm(void) { root[0] = 0; }
long faults_count(void) { return operations; }
const char *faults_hit(void) { return hit_name; }
void faults_log(int descriptor) { log_descriptor = descriptor; }

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static int below(const char *path) {
  size_t length = strlen(root);
  return length && !strncmp(path, root, length) && (path[length] == '/' || !path[length]);
}

static int path_of_descriptor(int descriptor, char *path) {
  char link[64];
  if (!root[0] || descriptor < 0) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
  ssize_t length = readlink(link, path, PATH_BYTES - 1);
  if (length < 0) return 0;
  path[length] = 0;
  return below(path);
}

static int path_at(int folder, const char *name, char *path) {
  char base[PATH_BYTES];
  if (!root[0] || !name) return 0;
  if (name[0] == '/') {
    snprintf(path, PATH_BYTES, "%s", name);
  } else if (folder == AT_FDCWD) {
    if (!getcwd(base, sizeof base)) return 0;
    snprintf(path, PATH_BYTES, "%.2000s/%.2000s", base, name);
  } else {
    if (!path_of_descriptor(folder, base)) return 0;
    snprintf(path, PATH_BYTES, "%.2000s/%.2000s", base, name);
  }
  return below(path);
}

/* Counts an operation; returns true, with errno set, if it must fail. A write that ends the process writes one half. */
static int fault(const char *name, int descriptor, const void *data, size_t size) {
  long n = operations++;
  if (mode == COUNT || n < target || (n > target && mode != FAIL_ON)) return 0;
  if (n == target) snprintf(hit_name, sizeof hit_name, "%s", name);
  if (mode == DIE) {
    if (size > 1) syscall(SYS_write, descriptor, data, size / 2);
    _exit(DEATH);
  }
  errno = error_number;
  return 1;
}

/* Logs one line "name inode offset size path path", followed by the data. */
static void record(const char *name, unsigned long inode, long offset, const char *path, const char *other,
                   const void *data, size_t size) {
  char line[2 * PATH_BYTES + 128];
  if (log_descriptor < 0) return;
  int length = snprintf(line, sizeof line, "%s\t%lu\t%ld\t%zu\t%s\t%s\n", name, inode, offset, size, path, other);
  syscall(SYS_write, log_descriptor, line, (size_t)length);
  if (size) syscall(SYS_write, log_descriptor, data, size);
}

static unsigned long inode_of(int descriptor) {
  struct stat status;
  return fstat(descriptor, &status) ? 0 : status.st_ino;
}

static unsigned long inode_at(const char *path) {
  struct stat status;
  return lstat(path, &status) ? 0 : status.st_ino;
}

/* Files */

static int open_file(int folder, const char *name, int flags, mode_t permissions) {
  char path[PATH_BYTES];
  int own = path_at(folder, name, path), existed = own && !access(path, F_OK);
  if (own && fault("open", -1, NULL, 0)) return -1;
  int descriptor = (int)syscall(SYS_openat, folder, name, flags, permissions);
  if (own && descriptor >= 0) {
    if (!existed) record("create", inode_of(descriptor), 0, path, "", NULL, 0);
    else if (flags & O_TRUNC) record("truncate", inode_of(descriptor), 0, path, "", NULL, 0);
  }
  return descriptor;
}

#define PERMISSIONS(last)                               \
  mode_t permissions = 0;                               \
  if (flags & (O_CREAT | O_TMPFILE)) {                  \
    va_list list;                                       \
    va_start(list, last);                               \
    permissions = va_arg(list, mode_t);                 \
    va_end(list);                                       \
  }

int open(const char *name, int flags, ...) {
  PERMISSIONS(flags)
  return open_file(AT_FDCWD, name, flags, permissions);
}
int open64(const char *name, int flags, ...) {
  PERMISSIONS(flags)
  return open_file(AT_FDCWD, name, flags, permissions);
}
int openat(int folder, const char *name, int flags, ...) {
  PERMISSIONS(flags)
  return open_file(folder, name, flags, permissions);
}
int openat64(int folder, const char *name, int flags, ...) {
  PERMISSIONS(flags)
  return open_file(folder, name, flags, permissions);
}
int creat(const char *name, mode_t permissions) {
  return open_file(AT_FDCWD, name, O_CREAT | O_WRONLY | O_TRUNC, permissions);
}
int creat64(const char *name, mode_t permissions) { return creat(name, permissions); }

/* Opens a C stream here, so that its descriptor is known; `fwrite` writes its buffer at once. */
FILE *fopen(const char *name, const char *kind) {
  char path[PATH_BYTES];
  if (!path_at(AT_FDCWD, name, path)) return REAL(fopen)(name, kind);
  int plus = strchr(kind, '+') != NULL, flags = plus ? O_RDWR : kind[0] == 'r' ? O_RDONLY : O_WRONLY;
  if (kind[0] != 'r') flags |= O_CREAT | (kind[0] == 'w' ? O_TRUNC : O_APPEND);
  int descriptor = open_file(AT_FDCWD, name, flags, 0666);
  return descriptor < 0 ? NULL : fdopen(descriptor, kind);
}
FILE *fopen64(const char *name, const char *kind) { return fopen(name, kind); }

static ssize_t write_some(const char *name, int descriptor, const void *data, size_t size, off_t place) {
  char path[PATH_BYTES];
  if (!path_of_descriptor(descriptor, path))
    return place < 0 ? syscall(SYS_write, descriptor, data, size) : syscall(SYS_pwrite64, descriptor, data, size, place);
  if (fault(name, descriptor, data, size)) return -1;
  off_t offset = place;
  if (place < 0) offset = lseek(descriptor, 0, fcntl(descriptor, F_GETFL) & O_APPEND ? SEEK_END : SEEK_CUR);
  ssize_t written = place < 0 ? syscall(SYS_write, descriptor, data, size)
                              : syscall(SYS_pwrite64, descriptor, data, size, place);
  if (written > 0) record("write", inode_of(descriptor), offset, path, "", data, (size_t)written);
  return written;
}

ssize_t write(int descriptor, const void *data, size_t size) { return write_some("write", descriptor, data, size, -1); }
ssize_t pwrite(int descriptor, const void *data, size_t size, off_t place) {
  return write_some("pwrite", descriptor, data, size, place);
}
ssize_t pwrite64(int descriptor, const void *data, size_t size, off_t place) {
  return write_some("pwrite", descriptor, data, size, place);
}
ssize_t writev(int descriptor, const struct iovec *parts, int count) {
  ssize_t total = 0;
  for (int i = 0; i < count; i++) {
    ssize_t written = write_some("writev", descriptor, parts[i].iov_base, parts[i].iov_len, -1);
    if (written < 0) return total ? total : -1;
    total += written;
    if ((size_t)written < parts[i].iov_len) break;
  }
  return total;
}
size_t fwrite(const void *data, size_t size, size_t count, FILE *stream) {
  char path[PATH_BYTES];
  if (!path_of_descriptor(fileno(stream), path)) return REAL(fwrite)(data, size, count, stream);
  if (fflush(stream) || !size) return 0;
  ssize_t written = write_some("fwrite", fileno(stream), data, size * count, -1);
  return written < 0 ? 0 : (size_t)written / size;
}

ssize_t read(int descriptor, void *data, size_t size) {
  char path[PATH_BYTES];
  if (path_of_descriptor(descriptor, path) && fault("read", -1, NULL, 0)) return -1;
  return syscall(SYS_read, descriptor, data, size);
}

static int cut(int descriptor, off_t length) {
  char path[PATH_BYTES];
  int own = path_of_descriptor(descriptor, path);
  if (own && fault("ftruncate", -1, NULL, 0)) return -1;
  int result = (int)syscall(SYS_ftruncate, descriptor, length);
  if (own && !result) record("truncate", inode_of(descriptor), length, path, "", NULL, 0);
  return result;
}
int ftruncate(int descriptor, off_t length) { return cut(descriptor, length); }
int ftruncate64(int descriptor, off_t length) { return cut(descriptor, length); }

/* Syncs do not reach the disk: no test stops the machine, and they would only take time. */
static int sync_file(const char *name, int descriptor) {
  char path[PATH_BYTES];
  if (!path_of_descriptor(descriptor, path)) return 0;
  if (fault(name, -1, NULL, 0)) return -1;
  record("sync", inode_of(descriptor), 0, path, "", NULL, 0);
  return 0;
}
int fsync(int descriptor) { return sync_file("fsync", descriptor); }
int fdatasync(int descriptor) { return sync_file("fdatasync", descriptor); }

int flock(int descriptor, int operation) {
  char path[PATH_BYTES];
  if (path_of_descriptor(descriptor, path) && fault("flock", -1, NULL, 0)) return -1;
  return (int)syscall(SYS_flock, descriptor, operation);
}

/* Names */

static int move(int folder, const char *name, int to_folder, const char *to_name, unsigned flags) {
  char path[PATH_BYTES], to_path[PATH_BYTES];
  int own = path_at(to_folder, to_name, to_path) && path_at(folder, name, path);
  if (own && fault("rename", -1, NULL, 0)) return -1;
  int result = (int)syscall(SYS_renameat2, folder, name, to_folder, to_name, flags);
  if (own && !result) record("rename", inode_at(to_path), 0, path, to_path, NULL, 0);
  return result;
}
int rename(const char *name, const char *to_name) { return move(AT_FDCWD, name, AT_FDCWD, to_name, 0); }
int renameat(int folder, const char *name, int to_folder, const char *to_name) {
  return move(folder, name, to_folder, to_name, 0);
}
int renameat2(int folder, const char *name, int to_folder, const char *to_name, unsigned flags) {
  return move(folder, name, to_folder, to_name, flags);
}

static int add_name(int folder, const char *name, int to_folder, const char *to_name, int flags) {
  char path[PATH_BYTES], to_path[PATH_BYTES];
  int own = path_at(to_folder, to_name, to_path) && path_at(folder, name, path);
  if (own && fault("link", -1, NULL, 0)) return -1;
  int result = (int)syscall(SYS_linkat, folder, name, to_folder, to_name, flags);
  if (own && !result) record("link", inode_at(to_path), 0, path, to_path, NULL, 0);
  return result;
}
int link(const char *name, const char *to_name) { return add_name(AT_FDCWD, name, AT_FDCWD, to_name, 0); }
int linkat(int folder, const char *name, int to_folder, const char *to_name, int flags) {
  return add_name(folder, name, to_folder, to_name, flags);
}

int mkdirat(int folder, const char *name, mode_t permissions) {
  char path[PATH_BYTES];
  int own = path_at(folder, name, path);
  if (own && fault("mkdir", -1, NULL, 0)) return -1;
  int result = (int)syscall(SYS_mkdirat, folder, name, permissions);
  if (own && !result) record("mkdir", inode_at(path), 0, path, "", NULL, 0);
  return result;
}
int mkdir(const char *name, mode_t permissions) { return mkdirat(AT_FDCWD, name, permissions); }

int unlinkat(int folder, const char *name, int flags) {
  char path[PATH_BYTES];
  int own = path_at(folder, name, path);
  if (own && fault(flags & AT_REMOVEDIR ? "rmdir" : "unlink", -1, NULL, 0)) return -1;
  int result = (int)syscall(SYS_unlinkat, folder, name, flags);
  if (own && !result) record("unlink", 0, 0, path, "", NULL, 0);
  return result;
}
int unlink(const char *name) { return unlinkat(AT_FDCWD, name, 0); }
int rmdir(const char *name) { return unlinkat(AT_FDCWD, name, AT_REMOVEDIR); }

DIR *opendir(const char *name) {
  char path[PATH_BYTES];
  if (path_at(AT_FDCWD, name, path) && fault("opendir", -1, NULL, 0)) return NULL;
  return REAL(opendir)(name);
}
