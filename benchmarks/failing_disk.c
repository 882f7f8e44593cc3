/* A disk below one folder that fails: every call that changes it is counted, and from a chosen one on (or only that
   one) it fails as the kernel would fail it. Loaded with LD_PRELOAD; started programs inherit it.

       cc -shared -fPIC -O2 -o failing_disk.so failing_disk.c -ldl

   ORION_FAILING_DISK_FOLDER   absolute path; nothing outside it is touched
   ORION_FAILING_DISK_AT       which operation fails, from 1; 0: none does, and each is written to the log
   ORION_FAILING_DISK_LIKE     a pattern (fnmatch) of "OPERATION PATH", the path relative to the folder; only those are counted
                         for ORION_FAILING_DISK_AT. Default: all
   ORION_FAILING_DISK_ERRNO    what the operation fails with: 28 for ENOSPC, 5 for EIO
   ORION_FAILING_DISK_STAYS    1: whatever comes after the failed operation fails as well, in any process: a full disk
   ORION_FAILING_DISK_COUNTER  a file of at least 16 bytes, shared by all processes of a run: operations counted so far, and
                         whether one has failed
   ORION_FAILING_DISK_LOG      gets a line "OPERATION PATH" for each operation, or for each one that failed

   C's own stdio writes inside of libc, where nothing can be put between: hence fopen, fwrite, fflush and fclose. What is there
   already
   (mkdir of a folder that exists, open of a file that is not cut) costs a full disk nothing and is let through. A failed
   write writes nothing. */

#undef _FORTIFY_SOURCE /* its inline open() would be a second definition */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdio_ext.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

#define PATH_BYTES 4096
#define BLOCK_BYTES 4096 /* of stdio's buffer, which is made at the first write */

static const char *folder, *like;
static size_t folder_length;
static int64_t fails_at;
static int fails_with, stays, log_file = -1;
static volatile int64_t *shared; /* [0]: operations counted, [1]: whether one has failed */

static const char *setting(const char *name, const char *otherwise) {
    const char *value = getenv(name);
    return value && *value ? value : otherwise;
}

__attribute__((constructor)) static void read_settings(void) {
    const char *counter = setting("ORION_FAILING_DISK_COUNTER", NULL), *log = setting("ORION_FAILING_DISK_LOG", NULL);
    const char *chosen = setting("ORION_FAILING_DISK_FOLDER", NULL);
    if (!chosen || !counter)
        return;
    fails_at = atoll(setting("ORION_FAILING_DISK_AT", "0"));
    fails_with = atoi(setting("ORION_FAILING_DISK_ERRNO", "28"));
    stays = atoi(setting("ORION_FAILING_DISK_STAYS", "0"));
    if ((like = setting("ORION_FAILING_DISK_LIKE", NULL)))
        like = strdup(like);
    int file = syscall(SYS_openat, AT_FDCWD, counter, O_RDWR | O_CLOEXEC, 0);
    void *memory = file < 0 ? MAP_FAILED : mmap(NULL, 16, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (memory == MAP_FAILED) {
        perror("ORION_FAILING_DISK_COUNTER");
        _exit(125);
    }
    close(file);
    shared = memory;
    if (log)
        log_file = fcntl(syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_APPEND | O_CREAT, 0644), F_DUPFD_CLOEXEC, 900);
    folder_length = strlen(chosen);
    folder = strdup(chosen); /* last: from here on calls are looked at */
}

/* Whether this operation fails; errno is set then. `path` is absolute. */
static int fails(const char *operation, const char *path) {
    if (strncmp(path, folder, folder_length) || (path[folder_length] != '/' && path[folder_length]))
        return 0;
    char line[PATH_BYTES + 64];
    const char *inside = path[folder_length] ? path + folder_length + 1 : ".";
    int length = snprintf(line, sizeof line - 1, "%s %s", operation, inside), failed = 0;
    if (length >= (int)sizeof line - 1)
        length = sizeof line - 2;
    if (stays && shared[1])
        failed = 1;
    else if (!like || !fnmatch(like, line, FNM_PATHNAME))
        failed = __atomic_add_fetch(&shared[0], 1, __ATOMIC_SEQ_CST) == fails_at;
    if (failed)
        shared[1] = 1;
    if (log_file >= 0 && (failed || !fails_at)) {
        line[length] = '\n';
        syscall(SYS_write, log_file, line, length + 1);
    }
    errno = failed ? fails_with : errno;
    return failed;
}

static int descriptor_fails(const char *operation, int descriptor) {
    if (!folder || descriptor < 0)
        return 0;
    char link[64], path[PATH_BYTES];
    int before = errno;
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, sizeof path - 1);
    errno = before;
    if (length <= 0 || path[0] != '/') /* a pipe, a socket */
        return 0;
    path[length] = 0;
    return fails(operation, path);
}

static int path_fails(const char *operation, int directory, const char *name) {
    if (!folder || !name)
        return 0;
    char path[2 * PATH_BYTES] = "";
    int before = errno;
    if (name[0] != '/') {
        char link[64] = "/proc/self/cwd";
        if (directory != AT_FDCWD)
            snprintf(link, sizeof link, "/proc/self/fd/%d", directory);
        ssize_t length = readlink(link, path, PATH_BYTES - 1);
        if (length > 0)
            strcpy(path + length, "/");
    }
    strncat(path, name, PATH_BYTES - 1);
    errno = before;
    return fails(operation, path);
}

static int is_there(int directory, const char *name) {
    int before = errno, there = syscall(SYS_faccessat, directory, name, F_OK) == 0;
    errno = before;
    return there;
}

static int open_fails(int directory, const char *name, int flags) {
    int changes = (flags & O_TRUNC) || ((flags & O_CREAT) && !is_there(directory, name)) ||
                  (flags & O_TMPFILE) == O_TMPFILE;
    return folder && changes && path_fails("open", directory, name);
}

#define MODE(flags)                                                  \
    mode_t mode = 0;                                                 \
    if ((flags) & (O_CREAT | O_TMPFILE)) {                           \
        va_list words;                                               \
        va_start(words, flags);                                      \
        mode = va_arg(words, mode_t);                                \
        va_end(words);                                               \
    }
#define OPEN(NAME)                                                   \
    int NAME(const char *name, int flags, ...) {                     \
        MODE(flags)                                                  \
        return open_fails(AT_FDCWD, name, flags) ? -1 : (int)syscall(SYS_openat, AT_FDCWD, name, flags, mode); \
    }
#define OPENAT(NAME)                                                 \
    int NAME(int directory, const char *name, int flags, ...) {      \
        MODE(flags)                                                  \
        return open_fails(directory, name, flags) ? -1 : (int)syscall(SYS_openat, directory, name, flags, mode); \
    }
OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)

int creat(const char *name, mode_t mode) { return open(name, O_CREAT | O_WRONLY | O_TRUNC, mode); }
int creat64(const char *name, mode_t mode) { return open(name, O_CREAT | O_WRONLY | O_TRUNC, mode); }

/* A call on a descriptor, made by its number unless it fails. */
#define CALL(TYPE, OPERATION, NAME, DESCRIPTOR, NUMBER, PARAMETERS, ...) \
    TYPE NAME PARAMETERS { return descriptor_fails(OPERATION, DESCRIPTOR) ? -1 : (TYPE)syscall(NUMBER, __VA_ARGS__); }
CALL(ssize_t, "write", write, file, SYS_write, (int file, const void *data, size_t count), file, data, count)
CALL(ssize_t, "write", pwrite, file, SYS_pwrite64, (int file, const void *data, size_t count, off_t at), file, data, count, at)
CALL(ssize_t, "write", pwrite64, file, SYS_pwrite64, (int file, const void *data, size_t count, off64_t at), file, data, count, at)
CALL(ssize_t, "write", writev, file, SYS_writev, (int file, const struct iovec *data, int count), file, data, count)
CALL(ssize_t, "copy", sendfile, to, SYS_sendfile, (int to, int from, off_t *at, size_t count), to, from, at, count)
CALL(ssize_t, "copy", sendfile64, to, SYS_sendfile, (int to, int from, off64_t *at, size_t count), to, from, at, count)
CALL(ssize_t, "copy", copy_file_range, to, SYS_copy_file_range, (int from, off64_t *start, int to, off64_t *at, size_t count, unsigned flags), from, start, to, at, count, flags)
CALL(int, "sync", fsync, file, SYS_fsync, (int file), file)
CALL(int, "sync", fdatasync, file, SYS_fdatasync, (int file), file)
CALL(int, "resize", ftruncate, file, SYS_ftruncate, (int file, off_t bytes), file, bytes)
CALL(int, "resize", ftruncate64, file, SYS_ftruncate, (int file, off64_t bytes), file, bytes)
CALL(int, "resize", fallocate, file, SYS_fallocate, (int file, int mode, off_t at, off_t bytes), file, mode, at, bytes)
CALL(int, "resize", fallocate64, file, SYS_fallocate, (int file, int mode, off64_t at, off64_t bytes), file, mode, at, bytes)

int truncate(const char *name, off_t bytes) {
    return path_fails("resize", AT_FDCWD, name) ? -1 : (int)syscall(SYS_truncate, name, bytes);
}
int truncate64(const char *name, off64_t bytes) { return truncate(name, bytes); }

/* Names: what counts is where the new one is. */
int renameat2(int from, const char *name, int to, const char *new_name, unsigned flags) {
    return path_fails("rename", to, new_name) ? -1 : (int)syscall(SYS_renameat2, from, name, to, new_name, flags);
}
int renameat(int from, const char *name, int to, const char *new_name) { return renameat2(from, name, to, new_name, 0); }
int rename(const char *name, const char *new_name) { return renameat2(AT_FDCWD, name, AT_FDCWD, new_name, 0); }

int mkdirat(int directory, const char *name, mode_t mode) {
    if (folder && !is_there(directory, name) && path_fails("mkdir", directory, name))
        return -1;
    return syscall(SYS_mkdirat, directory, name, mode);
}
int mkdir(const char *name, mode_t mode) { return mkdirat(AT_FDCWD, name, mode); }

int linkat(int from, const char *name, int to, const char *new_name, int flags) {
    return path_fails("link", to, new_name) ? -1 : (int)syscall(SYS_linkat, from, name, to, new_name, flags);
}
int link(const char *name, const char *new_name) { return linkat(AT_FDCWD, name, AT_FDCWD, new_name, 0); }
int symlinkat(const char *target, int directory, const char *name) {
    return path_fails("link", directory, name) ? -1 : (int)syscall(SYS_symlinkat, target, directory, name);
}
int symlink(const char *target, const char *name) { return symlinkat(target, AT_FDCWD, name); }

#define NEXT(NAME) ((__typeof__(&NAME))dlsym(RTLD_NEXT, #NAME))

static int fopen_fails(const char *name, const char *mode) {
    int flags = (mode[0] == 'w' ? O_TRUNC | O_CREAT : mode[0] == 'a' ? O_CREAT : 0);
    return open_fails(AT_FDCWD, name, flags);
}
FILE *fopen(const char *name, const char *mode) { return fopen_fails(name, mode) ? NULL : NEXT(fopen)(name, mode); }
FILE *fopen64(const char *name, const char *mode) { return fopen_fails(name, mode) ? NULL : NEXT(fopen64)(name, mode); }

/* The buffer of stdio is written to the file when it cannot take what comes, and at the end. */
size_t fwrite(const void *data, size_t size, size_t count, FILE *file) {
    static __typeof__(&fwrite) next;
    if (!next)
        next = NEXT(fwrite);
    size_t bytes = size * count, buffer = __fbufsize(file) ? __fbufsize(file) : BLOCK_BYTES;
    if (folder && bytes > 0 && __fpending(file) + bytes >= buffer && descriptor_fails("write", fileno(file)))
        return 0;
    return next(data, size, count, file);
}

int fflush(FILE *file) {
    if (file && folder && __fpending(file) && descriptor_fails("write", fileno(file)))
        return EOF;
    return NEXT(fflush)(file);
}

int fclose(FILE *file) {
    int before = errno, failed = folder && __fpending(file) && descriptor_fails("write", fileno(file)), why = errno;
    if (failed)
        __fpurge(file);
    int status = NEXT(fclose)(file);
    errno = failed ? why : status ? errno : before;
    return failed ? EOF : status;
}
