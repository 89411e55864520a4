// Runs one program that nobody trusts: no network, no processes, nothing written but a scratch
// folder that vanishes, nothing read but the paths it is given, and bounded time, memory and
// output.
//
//   confine --level namespaces --memory BYTES --cpu S --wall S --file BYTES --scratch BYTES
//           --stack BYTES [--read PATH]... [--program FD] [--report FD] -- COMMAND ARGUMENT...
//
// The command finds the program, if one is given, at descriptor 3. The report is one line: "exit
// CODE", "signal N", each with the peak memory in KiB and the CPU time in ms, or "refused WHY" when
// it was not started (on standard error where there is no report). Wall time is kept by an alarm:
// it ends this process, and with it all others.
//
// Levels. namespaces: a root of its own that holds --read and /scratch, its own process ids,
// network and IPC. landlock: where a container forbids user namespaces; the kernel's Landlock lets
// it read --read and write nothing but /dev/null, so there is no scratch folder. Landlock leaves
// stat and its like alone, and no limit of the kernel counts one program's threads there: the
// keeper is asked for both (seccomp's user notification). none: system calls and limits alone. All
// have the same list of allowed system calls (seccomp).
#include <fcntl.h>
#include <limits.h>
#include <linux/audit.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <sched.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

namespace {

#if defined(__x86_64__)
constexpr uint32_t kArchitecture = AUDIT_ARCH_X86_64;
#elif defined(__aarch64__)
constexpr uint32_t kArchitecture = AUDIT_ARCH_AARCH64;
#else
#error "confine knows the system calls of x86-64 and aarch64"
#endif

constexpr int kProgram = 3;          // the program's descriptor, as the command finds it
constexpr unsigned kNobody = 65534;  // who the program runs as
constexpr rlim_t kThreads = 64;
constexpr rlim_t kDescriptors = 64;
constexpr const char* kScratch = "/scratch";
constexpr const char* kHost = "sandbox";

// What headers older than the kernel lack.
#ifndef SYS_pidfd_open
constexpr long SYS_pidfd_open = 434;
#endif
#ifndef SYS_pidfd_getfd
constexpr long SYS_pidfd_getfd = 438;
#endif
#ifndef SYS_landlock_create_ruleset
constexpr long SYS_landlock_create_ruleset = 444, SYS_landlock_add_rule = 445,
               SYS_landlock_restrict_self = 446;
#endif
#ifndef SECCOMP_USER_NOTIF_FLAG_CONTINUE
constexpr uint32_t SECCOMP_USER_NOTIF_FLAG_CONTINUE = 1;
#endif
#ifndef SECCOMP_IOCTL_NOTIF_SET_FLAGS
#define SECCOMP_IOCTL_NOTIF_SET_FLAGS SECCOMP_IOW(4, __u64)
constexpr uint64_t SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP = 1;
#endif

struct Job {
  std::string level;
  rlim_t memory = 0, cpu = 0, file = 0, scratch = 0, stack = 0;
  double wall = 0;
  std::vector<std::string> read;
  int program = -1, report = -1;
  char** command = nullptr;
};

Job job;

[[noreturn]] void refuse(const std::string& what) {
  dprintf(job.report < 0 ? 2 : job.report, "refused %s: %s\n", what.c_str(), strerror(errno));
  _exit(125);
}

void must(bool done, const std::string& what) {
  if (!done) refuse(what);
}

rlim_t number(const char* text) {
  char* end = nullptr;
  errno = EINVAL;  // for what has no digits at all
  const rlim_t value = strtoull(text, &end, 10);
  must(end != text && *end == 0, text);
  return value;
}

void parse(int argc, char** argv) {
  int i = 1;
  for (; i + 1 < argc && strcmp(argv[i], "--") != 0; i += 2) {
    const std::string name = argv[i];
    const char* value = argv[i + 1];
    if (name == "--level") {
      job.level = value;
    } else if (name == "--read") {
      job.read.emplace_back(value);
    } else if (name == "--wall") {
      job.wall = strtod(value, nullptr);
    } else if (name == "--memory") {
      job.memory = number(value);
    } else if (name == "--cpu") {
      job.cpu = number(value);
    } else if (name == "--file") {
      job.file = number(value);
    } else if (name == "--scratch") {
      job.scratch = number(value);
    } else if (name == "--stack") {
      job.stack = number(value);
    } else if (name == "--program") {
      job.program = static_cast<int>(number(value));
    } else if (name == "--report") {
      job.report = static_cast<int>(number(value));
    } else {
      errno = EINVAL;
      refuse(name);
    }
  }
  errno = EINVAL;
  const bool level = job.level == "namespaces" || job.level == "landlock" || job.level == "none";
  must(level && job.memory && job.cpu && job.stack && job.wall > 0, "options");
  must(i + 1 < argc, "no command after --");
  job.command = argv + i + 1;
}

// ---- namespaces: a root that holds what may be read, and a scratch folder

void write_file(const std::string& path, const std::string& text, bool optional = false) {
  const int fd = open(path.c_str(), O_WRONLY | O_CLOEXEC);
  const bool done = fd >= 0 && write(fd, text.data(), text.size()) == ssize_t(text.size());
  if (fd >= 0) close(fd);
  must(done || optional, path);
}

// Who the child's users are. Root may let it be root for the set-up and nobody afterwards, so that
// root's files are closed to the program and its threads are counted; others are only themselves.
void map_users(pid_t child) {
  const std::string proc = "/proc/" + std::to_string(child);
  const std::string nobody = std::to_string(kNobody), one = " 1\n";
  write_file(proc + "/setgroups", "deny", /*optional=*/true);
  for (const auto& [file, id] : {std::pair{"/uid_map", geteuid()}, {"/gid_map", getegid()}}) {
    const std::string self = nobody + " " + std::to_string(id) + one;
    const std::string both = "0 0" + one + nobody + " " + nobody + one;
    const int fd = open((proc + file).c_str(), O_WRONLY | O_CLOEXEC);
    must(fd >= 0, proc + file);
    bool done = id == 0 && write(fd, both.data(), both.size()) == ssize_t(both.size());
    done = done || write(fd, self.data(), self.size()) == ssize_t(self.size());
    close(fd);
    must(done, proc + file);
  }
}

void make_folders(const std::string& path) {
  for (size_t at = path.find('/', 1); at != std::string::npos; at = path.find('/', at + 1)) {
    mkdir(path.substr(0, at).c_str(), 0755);
  }
}

void read_only(const std::string& path) {
  struct statvfs found;
  must(statvfs(path.c_str(), &found) == 0, path);
  // Flags that a mount has from outside are locked: a remount has to name them again.
  unsigned long flags = MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID;
  if (found.f_flag & ST_NODEV) flags |= MS_NODEV;
  if (found.f_flag & ST_NOEXEC) flags |= MS_NOEXEC;
  if (found.f_flag & ST_NOATIME) flags |= MS_NOATIME;
  if (found.f_flag & ST_NODIRATIME) flags |= MS_NODIRATIME;
  if (found.f_flag & ST_RELATIME) flags |= MS_RELATIME;
  must(mount(nullptr, path.c_str(), nullptr, flags, nullptr) == 0, "read-only " + path);
}

void show(const std::string& root, const std::string& path) {
  struct stat found;
  if (stat(path.c_str(), &found) != 0) return;  // /lib64 is not everywhere
  const std::string target = root + path;
  make_folders(target);
  if (S_ISDIR(found.st_mode)) {
    mkdir(target.c_str(), 0755);
  } else {
    close(open(target.c_str(), O_CREAT | O_WRONLY | O_CLOEXEC, 0444));
  }
  must(mount(path.c_str(), target.c_str(), nullptr, MS_BIND | MS_REC, nullptr) == 0, target);
  read_only(target);
}

void build_root() {
  must(mount(nullptr, "/", nullptr, MS_REC | MS_PRIVATE, nullptr) == 0, "private mounts");
  const std::string base = "/proc";  // covered in this namespace alone, and nobody needs it there
  must(mount("tmpfs", base.c_str(), "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755") == 0,
       "root");
  for (const auto& path : job.read) show(base, path);
  show(base, "/dev/null");
  const std::string scratch = base + kScratch;
  mkdir(scratch.c_str(), 0755);
  const std::string size = "nr_inodes=1000,mode=777,size=" + std::to_string(job.scratch);
  must(mount("tmpfs", scratch.c_str(), "tmpfs", MS_NOSUID | MS_NODEV, size.c_str()) == 0,
       "scratch");
  read_only(base);
  must(chdir(base.c_str()) == 0, base);
  // The old root comes to lie over the new one and is taken off: no folder is needed for it.
  must(syscall(SYS_pivot_root, ".", ".") == 0, "pivot_root");
  must(umount2(".", MNT_DETACH) == 0, "old root");
  must(chdir(kScratch) == 0, kScratch);
  must(sethostname(kHost, strlen(kHost)) == 0, "host name");
}

// ---- Landlock: kernel documentation, userspace-api/landlock

// The rules, as a descriptor.
int landlock_rules() {
  constexpr uint64_t kExecute = 1, kWriteFile = 2, kReadFile = 4, kReadFolder = 8;
  const long version = syscall(SYS_landlock_create_ruleset, nullptr, 0, 1);
  must(version >= 1, "landlock");
  uint64_t handled = (1 << 13) - 1;      // version 1: reading, writing, making and removing files
  if (version >= 2) handled |= 1 << 13;  // links across folders
  if (version >= 3) handled |= 1 << 14;  // truncation
  if (version >= 5) handled |= 1 << 15;  // ioctl of devices
  // Of the network nothing, and no signals or abstract sockets beyond its own processes: a second
  // bar, behind the list of system calls.
  const uint64_t attributes[] = {handled, version >= 4 ? 3u : 0u, version >= 6 ? 3u : 0u};
  const size_t size = sizeof(uint64_t) * (version >= 6 ? 3 : version >= 4 ? 2 : 1);
  const int rules = static_cast<int>(syscall(SYS_landlock_create_ruleset, attributes, size, 0));
  must(rules >= 0, "landlock rules");
  const auto allow = [rules](const std::string& path, uint64_t allowed) {
    struct __attribute__((packed)) {
      uint64_t allowed;
      int32_t parent;
    } rule = {allowed, open(path.c_str(), O_PATH | O_CLOEXEC)};
    struct stat found;
    if (rule.parent < 0 || fstat(rule.parent, &found) != 0) return;
    if (S_ISDIR(found.st_mode)) rule.allowed |= kReadFolder;
    must(syscall(SYS_landlock_add_rule, rules, /*path beneath*/ 1, &rule, 0) == 0, path);
    close(rule.parent);
  };
  for (const auto& path : job.read) allow(path, kExecute | kReadFile);
  allow("/dev/null", kReadFile | kWriteFile);
  return rules;
}

void landlock(int rules) {
  must(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0, "no new privileges");
  must(syscall(SYS_landlock_restrict_self, rules, 0) == 0, "landlock");
}

// ---- system calls: what an interpreter needs to compute, and no more

const long kAllowed[] = {
    SYS_read,
    SYS_write,
    SYS_readv,
    SYS_writev,
    SYS_pread64,
    SYS_pwrite64,
    SYS_close,
    SYS_fstat,
    SYS_lseek,
    SYS_getdents64,
    SYS_getcwd,
    SYS_fchdir,
    SYS_umask,
    SYS_dup,
    SYS_dup3,
    SYS_ftruncate,
    SYS_mkdirat,
    SYS_unlinkat,
    SYS_symlinkat,
    SYS_linkat,
    SYS_renameat2,
    SYS_copy_file_range,
    SYS_sendfile,
    SYS_pipe2,
    SYS_ppoll,
    SYS_pselect6,
    SYS_epoll_create1,
    SYS_epoll_ctl,
    SYS_epoll_pwait,
    SYS_eventfd2,
    SYS_timerfd_create,
    SYS_timerfd_settime,
    SYS_timerfd_gettime,
    SYS_mprotect,
    SYS_munmap,
    SYS_mremap,
    SYS_madvise,
    SYS_brk,
    SYS_rt_sigaction,
    SYS_rt_sigprocmask,
    SYS_rt_sigreturn,
    SYS_rt_sigpending,
    SYS_rt_sigtimedwait,
    SYS_rt_sigsuspend,
    SYS_sigaltstack,
    SYS_gettimeofday,
    SYS_times,
    SYS_clock_gettime,
    SYS_clock_getres,
    SYS_clock_nanosleep,
    SYS_nanosleep,
    SYS_setitimer,
    SYS_getitimer,
    SYS_getpid,
    SYS_gettid,
    SYS_getppid,
    SYS_getuid,
    SYS_geteuid,
    SYS_getgid,
    SYS_getegid,
    SYS_getresuid,
    SYS_getresgid,
    SYS_getgroups,
    SYS_getrusage,
    SYS_sched_yield,
    SYS_getcpu,
    SYS_futex,
    SYS_set_robust_list,
    SYS_set_tid_address,
    SYS_restart_syscall,
    SYS_membarrier,
    SYS_getrandom,
    SYS_exit,
    SYS_exit_group,
    SYS_wait4,
    SYS_waitid,
    SYS_execve,
    SYS_recvfrom,
    SYS_shutdown,
#ifdef SYS_rseq
    SYS_rseq,
#endif
#ifdef SYS_close_range
    SYS_close_range,
#endif
#ifdef __x86_64__  // the older forms, which glibc still calls
    SYS_creat,
    SYS_getdents,
    SYS_dup2,
    SYS_pipe,
    SYS_poll,
    SYS_select,
    SYS_epoll_create,
    SYS_epoll_wait,
    SYS_eventfd,
    SYS_mkdir,
    SYS_rmdir,
    SYS_unlink,
    SYS_symlink,
    SYS_link,
    SYS_rename,
    SYS_time,
    SYS_alarm,
    SYS_pause,
    SYS_getpgrp,
    SYS_arch_prctl,
    SYS_getrlimit,
#endif
};

// What asks for the host by a path, which Landlock leaves alone, or for its name.
const long kHostAsked[] = {
    SYS_newfstatat, SYS_statx, SYS_faccessat, SYS_readlinkat, SYS_uname,
#ifdef SYS_faccessat2
    SYS_faccessat2,
#endif
#ifdef __x86_64__
    SYS_stat,       SYS_lstat, SYS_access,    SYS_readlink,
#endif
};

using Filter = std::vector<sock_filter>;

void load(Filter& filter, size_t offset) {
  filter.push_back(BPF_STMT(BPF_LD | BPF_W | BPF_ABS, static_cast<uint32_t>(offset)));
}

void answer(Filter& filter, uint32_t action) {
  filter.push_back(BPF_STMT(BPF_RET | BPF_K, action));
}

constexpr uint32_t kDenied = SECCOMP_RET_ERRNO | EPERM;

// An argument whose bits of `mask` are one of `values`. Its low half: pointers are not looked at.
struct Condition {
  int argument;
  std::vector<uint32_t> values;
  uint32_t mask = ~0u;
};

// The call `number` has `action` where all conditions hold, and else is denied.
void allow_if(Filter& filter, long number, const std::vector<Condition>& conditions,
              uint32_t action = SECCOMP_RET_ALLOW) {
  size_t size = 1;
  for (const auto& condition : conditions) size += 3 + condition.values.size();
  filter.push_back(BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, static_cast<uint32_t>(number), 0,
                            static_cast<uint8_t>(size)));
  for (const auto& [argument, values, mask] : conditions) {
    load(filter, offsetof(seccomp_data, args) + 8 * argument);
    filter.push_back(BPF_STMT(BPF_ALU | BPF_AND | BPF_K, mask));
    size_t left = values.size();  // a jump goes over the other values and the answer
    for (const uint32_t value : values) {
      filter.push_back(BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, value, static_cast<uint8_t>(left--), 0));
    }
    answer(filter, kDenied);
  }
  answer(filter, action);
}

void always(Filter& filter, long number, uint32_t action) {
  filter.push_back(BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, static_cast<uint32_t>(number), 0, 1));
  answer(filter, action);
}

// On the level landlock the keeper is asked: the descriptor is the one that it listens to.
int filter_calls() {
  const bool supervised = job.level == "landlock";
  const uint32_t asked = supervised ? SECCOMP_RET_USER_NOTIF : SECCOMP_RET_ALLOW;
  Filter filter;
  load(filter, offsetof(seccomp_data, arch));
  filter.push_back(BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, kArchitecture, 1, 0));
  answer(filter, SECCOMP_RET_KILL_PROCESS);
  load(filter, offsetof(seccomp_data, nr));
  for (const long number : kAllowed) always(filter, number, SECCOMP_RET_ALLOW);
  for (const long number : kHostAsked) always(filter, number, asked);
  if (!supervised)
    always(filter, SYS_chdir, SECCOMP_RET_ALLOW);  // a keeper cannot do it for others
  for (const long number : {SYS_fsync, SYS_fdatasync}) {
    always(filter, number, SECCOMP_RET_ERRNO);  // done: nothing here outlives the program
  }
  // A path may be opened to read or to write. O_PATH and the access mode 3 would pass Landlock, and
  // O_TRUNC alone would cut what may be read, on kernels whose Landlock knows no truncation.
  const std::vector<uint32_t> ways = {O_RDONLY, O_WRONLY, O_RDWR, O_WRONLY | O_TRUNC,
                                      O_RDWR | O_TRUNC};
  constexpr uint32_t kWay = O_ACCMODE | O_TRUNC | O_PATH;
  allow_if(filter, SYS_openat, {{2, ways, kWay}});
#ifdef __x86_64__
  allow_if(filter, SYS_open, {{1, ways, kWay}});
#endif
  allow_if(filter, SYS_mmap, {{3, {0}, MAP_HUGETLB}});  // the machine's huge pages are others'
  // No locks, leases and watches of the host's files, no signals to who knows whom.
  allow_if(filter, SYS_fcntl,
           {{1, {F_DUPFD, F_DUPFD_CLOEXEC, F_GETFD, F_SETFD, F_GETFL, F_SETFL}}});
  // Threads that share everything: a table of descriptors of its own would be another 64.
  constexpr uint32_t kShared = CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SIGHAND | CLONE_THREAD;
  constexpr uint32_t kOfThreads =
      CLONE_SYSVSEM | CLONE_SETTLS | CLONE_PARENT_SETTID | CLONE_CHILD_CLEARTID | CLONE_DETACHED;
  allow_if(filter, SYS_clone, {{0, {kShared}, ~kOfThreads}}, asked);
  const auto self = static_cast<uint32_t>(getpid());
  for (const long number : {SYS_kill, SYS_tgkill}) allow_if(filter, number, {{0, {self}}});
  for (const long number : {SYS_getpgid, SYS_getsid, SYS_sched_getaffinity}) {
    allow_if(filter, number, {{0, {0, self}}});
  }
  allow_if(filter, SYS_prlimit64, {{0, {0}}});  // its own limits: down, not up
  allow_if(filter, SYS_ioctl, {{1, {TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIOCLEX}}});
  // Streams between its own threads. A datagram could be addressed to any socket of the host.
  allow_if(filter, SYS_socketpair, {{0, {AF_UNIX}}, {1, {SOCK_STREAM}, 0xf}});
  allow_if(filter, SYS_sendto, {{5, {0}}});  // without an address
#ifdef SYS_clone3  // its flags lie in memory, out of a filter's sight: glibc then takes clone
  always(filter, SYS_clone3, SECCOMP_RET_ERRNO | ENOSYS);
#endif
  answer(filter, kDenied);
  const sock_fprog program = {static_cast<unsigned short>(filter.size()), filter.data()};
  const unsigned flags = supervised ? SECCOMP_FILTER_FLAG_NEW_LISTENER : 0;
  const long done = syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, flags, &program);
  must(done >= 0, "seccomp");
  return static_cast<int>(done);
}

// ---- supervision: the keeper looks for a program that Landlock confines
//
// It lives under the same rules of Landlock, a level above the program, so that it can open what
// the program can, and the program cannot reach into it.

struct Program {
  pid_t id;
  int handle;
};

// Text in the program's memory; empty where it cannot be read or has no end.
std::string text_of(const Program& program, uint64_t address) {
  char text[PATH_MAX];
  const size_t page = 4096, first = page - address % page;
  const iovec local = {text, sizeof text};
  const auto at = [](uint64_t where) { return reinterpret_cast<void*>(where); };
  const iovec remote[] = {{at(address), first}, {at(address + first), sizeof text - first}};
  const ssize_t size = process_vm_readv(program.id, &local, 1, remote, 2, 0);
  const bool ends = size > 0 && memchr(text, 0, static_cast<size_t>(size));
  return ends ? std::string(text) : std::string();
}

long give(const Program& program, uint64_t address, const void* value, size_t size) {
  const iovec local = {const_cast<void*>(value), size};
  const iovec remote = {reinterpret_cast<void*>(address), size};
  const ssize_t given = process_vm_writev(program.id, &local, 1, &remote, 1, 0);
  return given == static_cast<ssize_t>(size) ? 0 : -EFAULT;
}

// What a path or a descriptor of the program leads to, opened here if it may be read.
int open_for(const Program& program, uint64_t folder, uint64_t path, uint64_t flags) {
  const int base = static_cast<int>(folder);
  const std::string text = path ? text_of(program, path) : std::string();
  const auto descriptor = [&program, base] {
    return base == AT_FDCWD
               ? open(("/proc/" + std::to_string(program.id) + "/cwd").c_str(), O_PATH | O_CLOEXEC)
               : static_cast<int>(syscall(SYS_pidfd_getfd, program.handle, base, 0));
  };
  if (text.empty()) return flags & AT_EMPTY_PATH ? descriptor() : -1;
  constexpr int kLook = O_RDONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC;
  if (text[0] == '/') return open(text.c_str(), kLook);
  const int start = descriptor();
  if (start < 0) return -1;
  const int found = openat(start, text.c_str(), kLook);
  close(start);
  return found;
}

long look(const Program& program, const seccomp_data& call) {
  const auto& [a, b, c, d, e, f] = call.args;
  (void)f;
  if (call.nr == SYS_uname) {
    utsname names = {};
    uname(&names);
    strcpy(names.nodename, kHost);
    return give(program, a, &names, sizeof names);
  }
  int file = -1;
  switch (call.nr) {
    case SYS_newfstatat:
      file = open_for(program, a, b, d);
      break;
    case SYS_statx:
      file = open_for(program, a, b, c);
      break;
    case SYS_faccessat:
    case SYS_readlinkat:
      file = open_for(program, a, b, 0);
      break;
#ifdef SYS_faccessat2
    case SYS_faccessat2:
      file = open_for(program, a, b, d);
      break;
#endif
    default:
      file = open_for(program, static_cast<uint64_t>(AT_FDCWD), a, 0);
  }
  if (file < 0) return -ENOENT;  // whether it is there or not
  struct stat found = {};
  long result = fstat(file, &found) == 0 ? 0 : -errno;
  const auto access = [&found](uint64_t mode) {
    const bool runs = S_ISDIR(found.st_mode) || found.st_mode & 0111;
    return mode & W_OK || (mode & X_OK && !runs) ? -EACCES : 0;
  };
  switch (result == 0 ? call.nr : -1) {
    case SYS_newfstatat:
      result = give(program, c, &found, sizeof found);
      break;
    case SYS_statx: {
      struct statx more = {};
      result = statx(file, "", AT_EMPTY_PATH, static_cast<unsigned>(d), &more) == 0
                   ? give(program, e, &more, sizeof more)
                   : -errno;
      break;
    }
    case SYS_readlinkat:
      result = -EINVAL;  // as it is opened it is no link
      break;
    case SYS_faccessat:
#ifdef SYS_faccessat2
    case SYS_faccessat2:
#endif
      result = access(c);
      break;
#ifdef __x86_64__
    case SYS_stat:
    case SYS_lstat:
      result = give(program, b, &found, sizeof found);
      break;
    case SYS_access:
      result = access(b);
      break;
    case SYS_readlink:
      result = -EINVAL;
      break;
#endif
  }
  close(file);
  return result;
}

rlim_t threads_of(const Program& program) {
  struct stat tasks;
  const std::string folder = "/proc/" + std::to_string(program.id) + "/task";
  // Without /proc nothing counts them, and there are none.
  return stat(folder.c_str(), &tasks) == 0 ? tasks.st_nlink - 2 : kThreads;
}

// Answers the program's questions until it ends.
void supervise(const Program& program, int listener) {
  // Who answers runs where the asker ran, which is faster; kernels before 6.6 do not know it.
  ioctl(listener, SECCOMP_IOCTL_NOTIF_SET_FLAGS, SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP);
  pollfd events[] = {{listener, POLLIN, 0}, {program.handle, POLLIN, 0}};
  while (poll(events, 2, -1) >= 0 || errno == EINTR) {
    if (events[1].revents || events[0].revents & (POLLHUP | POLLERR)) return;
    seccomp_notif asked = {};
    if (ioctl(listener, SECCOMP_IOCTL_NOTIF_RECV, &asked) != 0) continue;
    seccomp_notif_resp answer = {asked.id, 0, 0, 0};
    if (asked.data.nr != SYS_clone) {
      answer.error = static_cast<int>(look(program, asked.data));
    } else if (threads_of(program) >= kThreads) {
      answer.error = -EAGAIN;
    } else {
      answer.flags = SECCOMP_USER_NOTIF_FLAG_CONTINUE;
    }
    ioctl(listener, SECCOMP_IOCTL_NOTIF_SEND, &answer);
  }
}

// ---- processes: this one waits for the keeper, the keeper for the program

void limit(int what, rlim_t soft, rlim_t hard) {
  const rlimit value = {soft, hard};
  must(setrlimit(what, &value) == 0, "limit " + std::to_string(what));
}

// Root's powers end here, for those who stay root: the program could raise its limits, or lower
// those of others. It may go on to read what root could, under the same rules as all.
void drop_capabilities() {
  __user_cap_header_struct header = {_LINUX_CAPABILITY_VERSION_3, 0};
  __user_cap_data_struct data[2] = {};
  must(syscall(SYS_capget, &header, data) == 0, "capabilities");
  const uint32_t kept = data[0].permitted & (1u << CAP_DAC_READ_SEARCH);
  data[0] = {kept, kept, 0};
  data[1] = {};
  must(syscall(SYS_capset, &header, data) == 0, "capabilities");
}

// channel: to the keeper, which learns there where it can listen; rules: Landlock's. Or -1 both.
[[noreturn]] void run_program(int channel, int rules) {
  if (job.report >= 0) {
    job.report = fcntl(job.report, F_DUPFD_CLOEXEC, 16);  // out of the way of descriptor 3
    must(job.report >= 0, "report");
  }
  if (channel >= 0) {
    channel = fcntl(channel, F_DUPFD_CLOEXEC, 16);
    rules = fcntl(rules, F_DUPFD_CLOEXEC, 16);
    must(channel >= 0 && rules >= 0, "channel");
  }
  if (job.program >= 0) must(dup2(job.program, kProgram) == kProgram, "program");
  for (int fd = kProgram + (job.program >= 0); fd < 1024; ++fd) {
    if (fd != job.report && fd != channel && fd != rules) close(fd);
  }
  setsid();
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (job.level == "namespaces") {
    must(setresgid(kNobody, kNobody, kNobody) == 0, "group");
    must(setresuid(kNobody, kNobody, kNobody) == 0, "user");  // capabilities end with the exec
    limit(RLIMIT_NPROC, kThreads, kThreads);
  }
  limit(RLIMIT_CORE, 1, 1);  // nothing, and unlike 0 not to the host's handler of dumps either
  limit(RLIMIT_CPU, job.cpu, job.cpu + 1);  // a signal, which can be caught, and then the end
  limit(RLIMIT_FSIZE, job.file, job.file);
  limit(RLIMIT_NOFILE, kDescriptors, kDescriptors);
  limit(RLIMIT_STACK, job.stack, job.stack);
  limit(RLIMIT_MEMLOCK, 0, 0);
  limit(RLIMIT_MSGQUEUE, 0, 0);
  must(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0, "no new privileges");
  if (job.level != "namespaces") drop_capabilities();
  if (rules >= 0) landlock(rules);
  limit(RLIMIT_AS, job.memory, job.memory);
  const int listener = filter_calls();
  if (channel >= 0) {
    char byte = 0;
    const bool heard = write(channel, &listener, sizeof listener) == sizeof listener &&
                       read(channel, &byte, 1) == 1;
    must(heard, "keeper");
  }
  char language[] = "LANG=C.UTF-8", home[] = "HOME=/scratch", path[] = "PATH=/usr/bin:/bin";
  char seed[] = "PYTHONHASHSEED=0";  // the order of a set, for who heeds it
  char* environment[] = {language, home, path, seed, nullptr};
  execve(job.command[0], job.command, environment);
  refuse(job.command[0]);
}

// Waits for the program and says how it ended. In namespaces it is process 1: when it goes, the
// kernel ends whatever the program left behind.
[[noreturn]] void keep() {
  int channel[2] = {-1, -1}, rules = -1;
  if (job.level == "landlock") {
    rules = landlock_rules();
    landlock(rules);
    must(chdir("/") == 0, "/");
    must(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, channel) == 0, "channel");
  }
  const pid_t program = fork();
  must(program >= 0, "fork");
  if (program == 0) run_program(channel[1], rules);
  if (rules >= 0) {
    close(channel[1]);
    close(rules);
    int listener = -1;
    if (read(channel[0], &listener, sizeof listener) == sizeof listener) {
      const int handle = static_cast<int>(syscall(SYS_pidfd_open, program, 0));
      must(handle >= 0, "handle of the program");
      listener = static_cast<int>(syscall(SYS_pidfd_getfd, handle, listener, 0));
      must(listener >= 0, "listener");
      must(write(channel[0], "", 1) == 1, "program");
      supervise({program, handle}, listener);
    }
  }
  int status = 0;
  rusage used = {};
  while (wait4(program, &status, 0, &used) != program) {
    if (errno != EINTR) refuse("wait");
  }
  if (WIFEXITED(status) && WEXITSTATUS(status) == 125) {
    struct stat said;  // a program of its own accord may end in 125 as well
    if (fstat(job.report, &said) == 0 && said.st_size > 0) _exit(125);
  }
  const bool exited = WIFEXITED(status);
  const long ms = (used.ru_utime.tv_sec + used.ru_stime.tv_sec) * 1000 +
                  (used.ru_utime.tv_usec + used.ru_stime.tv_usec) / 1000;
  dprintf(job.report, "%s %d %ld %ld\n", exited ? "exit" : "signal",
          exited ? WEXITSTATUS(status) : WTERMSIG(status), used.ru_maxrss, ms);
  _exit(0);
}

}  // namespace

int main(int argc, char** argv) {
  parse(argc, argv);
  signal(SIGALRM, SIG_DFL);
  sigset_t none;  // a caller's thread may have blocked the alarm
  sigemptyset(&none);
  must(sigprocmask(SIG_SETMASK, &none, nullptr) == 0, "signals");
  const double whole = static_cast<double>(static_cast<long>(job.wall));
  const itimerval wall = {{0, 0}, {long(whole), long((job.wall - whole) * 1e6)}};
  must(setitimer(ITIMER_REAL, &wall, nullptr) == 0, "wall");
  const bool namespaces = job.level == "namespaces";
  constexpr unsigned long kNew = CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET |
                                 CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWCGROUP;
  int mapped[2];
  must(pipe2(mapped, O_CLOEXEC) == 0, "pipe");
  // As fork does it, with namespaces of its own: glibc's clone would want a stack.
  const long keeper =
      syscall(SYS_clone, (namespaces ? kNew : 0) | SIGCHLD, nullptr, nullptr, nullptr, 0);
  must(keeper >= 0, namespaces ? "user namespaces" : "fork");
  if (keeper == 0) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    close(mapped[1]);
    char byte = 0;
    if (read(mapped[0], &byte, 1) != 1) _exit(125);  // the launcher is gone
    if (namespaces) build_root();
    keep();
  }
  close(mapped[0]);
  if (namespaces) map_users(static_cast<pid_t>(keeper));
  must(write(mapped[1], "", 1) == 1, "start");
  int status = 0;
  while (waitpid(static_cast<pid_t>(keeper), &status, 0) < 0 && errno == EINTR) {
  }
  if (WIFEXITED(status)) return WEXITSTATUS(status);
  dprintf(job.report, "signal %d 0 0\n",
          WTERMSIG(status));  // of the keeper: the program's end, too
  return 0;
}
