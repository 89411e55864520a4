"""Programs that try to get out of the sandbox, to outlive it, or to take the machine down.

Each prints ESCAPED if it gets what it wants. `expected` are the statuses that may be reported;
`reason` is a piece of what is said of it. HOST stands for a folder of the host with a file
`secret` in it, PARENT for the process that runs the test.
"""

from typing import NamedTuple


class Hostile(NamedTuple):
    program: str
    expected: tuple[str, ...] = ("error",)
    reason: str = ""


# How one calls the kernel without Python's own functions.
_SYSCALL = "import ctypes; call = ctypes.CDLL(None, use_errno=True).syscall\n"

_LIBRARY = "import fcntl, os\nf = os.open(os.__file__, 0)\n"


def syscall(number: int, *arguments: object, good: str = ">= 0") -> Hostile:
    """A raw system call (numbers of x86-64), which must not succeed."""
    given = ", ".join(map(str, (number, *arguments)))
    return Hostile(
        f"{_SYSCALL}if call({given}) {good}: print('ESCAPED')", ("ok", "error", "signal")
    )


PROGRAMS = {
    # processes
    "fork": Hostile("import os\nos.fork()\nprint('ESCAPED')", reason="not permitted"),
    "fork bomb": Hostile("import os\nwhile True: os.fork()", reason="not permitted"),
    "vfork and exec": Hostile(
        "import subprocess\nsubprocess.run(['/bin/true'])\nprint('ESCAPED')", reason="Error"
    ),
    "shell": Hostile("import os\nif os.system('true') == 0: print('ESCAPED')", ("ok", "error")),
    "multiprocessing": Hostile(
        "import multiprocessing as m\n"
        "p = m.get_context('fork').Process(target=print)\np.start()\nprint('ESCAPED')"
    ),
    "posix_spawn": Hostile("import os\nos.posix_spawn('/bin/true', ['t'], {})\nprint('ESCAPED')"),
    "exec of a shell": Hostile("import os\nos.execv('/bin/sh', ['sh', '-c', 'echo ESCAPED'])"),
    "thread bomb": Hostile(
        "import threading, time\nthreading.stack_size(32768)\n"
        "for i in range(100_000): threading.Thread(target=time.sleep, args=(9,)).start()\n"
        "print('ESCAPED')",
        ("error", "memory", "time", "signal"),
    ),
    "kill the parent": Hostile(
        "import os, signal\nos.kill(PARENT, signal.SIGKILL)\nprint('ESCAPED')", reason="Error"
    ),
    "kill every process": Hostile("import os\nos.kill(-1, 9)\nprint('ESCAPED')", reason="Error"),
    "kill the group": Hostile("import os\nos.killpg(0, 9)\nprint('ESCAPED')", reason="Error"),
    "kill the keeper": Hostile("import os\nos.kill(os.getppid(), 9)\nprint('ESCAPED')"),
    "kill itself": Hostile("import os\nos.kill(os.getpid(), 9)", ("signal",), "SIGKILL"),
    "ptrace the keeper": syscall(101, 16, 1, 0, 0, good="== 0"),
    "ptrace itself": syscall(101, 0, 0, 0, 0, good="== 0"),
    "read another's memory": syscall(310, "PARENT", 0, 0, 0, 0, 0),
    "a new session's terminal": Hostile(
        "import fcntl, termios\nfcntl.ioctl(0, termios.TIOCSTI, b'x')\nprint('ESCAPED')"
    ),
    "priority": Hostile("import os\nos.setpriority(0, 0, -20)\nprint('ESCAPED')"),
    "realtime": Hostile(
        "import os\nos.sched_setscheduler(0, 1, os.sched_param(1))\nprint('ESCAPED')"
    ),
    "raise a limit": Hostile(
        "import resource as r\nr.setrlimit(r.RLIMIT_AS, (r.RLIM_INFINITY,) * 2)\nprint('ESCAPED')"
    ),
    "limits of another": Hostile(
        "import resource as r\nr.prlimit(1, r.RLIMIT_CPU)\nprint('ESCAPED')"
    ),
    # memory
    "memory balloon": Hostile("x = bytearray(8 << 30)\nprint('ESCAPED')", ("memory",), "MiB"),
    "slow balloon": Hostile("x = []\nwhile True: x.append(bytearray(1 << 20))", ("memory",), "MiB"),
    "list of lists": Hostile(
        "x = []\nwhile True: x = [x] * 1000000, x", ("memory", "error", "time", "signal")
    ),
    "shared memory": Hostile(
        "import mmap\nx = mmap.mmap(-1, 8 << 30)\nprint('ESCAPED')", ("error", "memory")
    ),
    "memory files": Hostile("import os\nos.memfd_create('x')\nprint('ESCAPED')"),
    "system V memory": syscall(29, 0, 1 << 30, 950),
    "large string": Hostile("'x' * (1 << 40)", ("memory",), "MiB"),
    "large power": Hostile("x = 10 ** 10 ** 9", ("time", "memory"), ""),
    # time
    "endless loop": Hostile("while True: pass", ("time",), "CPU"),
    "loop that takes SIGXCPU": Hostile(
        "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass",
        ("time",),
        "CPU",
    ),
    "sleep": Hostile("import time\ntime.sleep(1000)", ("time",), "wall"),
    "wait for input": Hostile(
        "import sys\nsys.stdin.read()\nimport time\ntime.sleep(99)", ("time",), "wall"
    ),
    "sleep in a thread": Hostile(
        "import threading, time\nthreading.Thread(target=time.sleep, args=(99,)).start()",
        ("time",),
        "wall",
    ),
    "deadlock": Hostile(
        "import threading\nl = threading.Lock()\nl.acquire()\nl.acquire()", ("time",), "wall"
    ),
    "ignore the alarm": Hostile(
        "import signal, time\nfor s in range(1, 32):\n"
        "  try: signal.signal(s, signal.SIG_IGN)\n  except (OSError, ValueError): pass\n"
        "time.sleep(99)",
        ("time",),
        "wall",
    ),
    "backtracking": Hostile("import re\nre.match('(a+)+b', 'a' * 50)", ("time",), "CPU"),
    "recursion": Hostile("def f(): f()\nf()", ("error",), "RecursionError"),
    "recursion without end": Hostile(
        "import sys\nsys.setrecursionlimit(10**9)\n"
        "class A:\n  def __repr__(self): return repr(self)\nrepr(A())",
        ("signal", "error", "memory"),
    ),
    # output
    "giant output": Hostile("while True: print('x' * 1000)", ("output",), "bytes"),
    "giant complaint": Hostile(
        "import sys\nwhile True: sys.stderr.write('x' * 1000)", ("output", "error", "signal")
    ),
    "giant file": Hostile(
        "f = open('/scratch/x', 'wb')\nwhile True: f.write(bytes(1 << 20)); f.flush()",
        ("output", "error"),
    ),
    "many files": Hostile("for i in range(10**6): open(f'/scratch/{i}', 'w')\nprint('ESCAPED')"),
    "fill the scratch folder": Hostile(
        "for i in range(100): open(f'/scratch/{i}', 'wb').write(bytes(1 << 15))\nprint('ESCAPED')"
    ),
    "output that ends a terminal's line": Hostile("print('\\x1b]0;ESC\\x07' * 10)", ("ok",)),
    "descriptors": Hostile("import os\nwhile True: os.dup(1)", reason="Too many open files"),
    # files
    "read the secret": Hostile("print('ESCAPED', open('HOST/secret').read())", reason="Error"),
    "list the host": Hostile("import os\nos.listdir('HOST')\nprint('ESCAPED')", reason="Error"),
    "overwrite the secret": Hostile("open('HOST/secret', 'w')\nprint('ESCAPED')", reason="Error"),
    "delete the secret": Hostile("import os\nos.remove('HOST/secret')\nprint('ESCAPED')"),
    "delete everything": Hostile(
        "import shutil\nshutil.rmtree('/', ignore_errors=True)\nshutil.rmtree('HOST')",
        ("error", "time"),
    ),
    "passwords": Hostile("open('/etc/shadow')\nprint('ESCAPED')", reason="Error"),
    "users": Hostile("open('/etc/passwd')\nprint('ESCAPED')", reason="Error"),
    "symbolic link": Hostile(
        "import os\nos.chdir('/scratch')\nos.symlink('HOST/secret', 'x')\n"
        "print('ESCAPED', open('x').read())"
    ),
    "link through ..": Hostile("print('ESCAPED', open('/scratch/../../../..HOST/secret').read())"),
    "hard link": Hostile("import os\nos.link('HOST/secret', '/scratch/x')\nprint('ESCAPED')"),
    "write to the library": Hostile("import os\nopen(os.__file__, 'a')\nprint('ESCAPED')"),
    "write to the interpreter": Hostile("import sys\nopen(sys.executable, 'ab')\nprint('ESCAPED')"),
    "write to the root": Hostile("open('/x', 'w')\nprint('ESCAPED')", reason="Error"),
    "write to /tmp": Hostile("open('/tmp/x', 'w')\nprint('ESCAPED')", reason="Error"),
    "permissions": Hostile("import os, sys\nos.chmod(sys.executable, 0o777)\nprint('ESCAPED')"),
    "proc": Hostile("import os\nos.listdir('/proc/self')\nprint('ESCAPED')", reason="Error"),
    "memory by proc": Hostile("open('/proc/self/mem', 'r+b')\nprint('ESCAPED')", reason="Error"),
    "the parent's environment": Hostile("print('ESCAPED', open('/proc/PARENT/environ').read())"),
    "environment": Hostile(
        "import os\nif set(os.environ) - {'LANG', 'HOME', 'PATH', 'LC_CTYPE', 'PYTHONHASHSEED'}:"
        " print('ESCAPED')",
        ("ok",),
    ),
    "devices": Hostile("open('/dev/mem', 'rb')\nprint('ESCAPED')", reason="Error"),
    "make a device": Hostile(
        "import os\nos.mknod('/scratch/x', 0o600 | 0o60000, 2048)\nprint('ESCAPED')"
    ),
    "the launcher's descriptors": Hostile(
        "import os\nfor fd in range(3, 64):\n"
        "  try: os.write(fd, b'exit 0 0 0\\n'); print('ESCAPED')\n  except OSError: pass",
        ("ok",),
    ),
    "extended attributes": Hostile(
        "import os, sys\nos.setxattr(sys.executable, 'user.x', b'')\nprint('ESCAPED')"
    ),
    # network
    "connect": Hostile(
        "import socket\nsocket.create_connection(('127.0.0.1', 1), 1)\nprint('ESCAPED')"
    ),
    "listen": Hostile("import socket\nsocket.socket().bind(('', 0))\nprint('ESCAPED')"),
    "datagram": Hostile("import socket as s\ns.socket(s.AF_INET, s.SOCK_DGRAM)\nprint('ESCAPED')"),
    "raw packets": Hostile(
        "import socket as s\ns.socket(s.AF_PACKET, s.SOCK_RAW)\nprint('ESCAPED')"
    ),
    "unix socket": Hostile("import socket as s\ns.socket(s.AF_UNIX)\nprint('ESCAPED')"),
    "netlink": Hostile("import socket as s\ns.socket(s.AF_NETLINK, s.SOCK_RAW)\nprint('ESCAPED')"),
    "download": Hostile(
        "import urllib.request as u\nu.urlopen('http://127.0.0.1:1')\nprint('ESCAPED')"
    ),
    "resolve a name": Hostile(
        "import socket\nsocket.gethostbyname('example.com')\nprint('ESCAPED')"
    ),
    # the kernel
    "mount": syscall(165, "b'x'", "b'/scratch'", "b'tmpfs'", 0, 0),
    "unmount": syscall(166, "b'/scratch'", 0),
    "chroot": Hostile("import os\nos.chroot('/scratch')\nprint('ESCAPED')"),
    "pivot_root": syscall(155, "b'.'", "b'.'"),
    "user namespace": syscall(272, 0x10000000),
    "enter a namespace": syscall(308, 0, 0),
    "clone a namespace": syscall(56, 0x10000000 | 17, 0, 0, 0, 0),
    "clone3": syscall(435, 0, 0),
    "become root": Hostile("import os\nos.setuid(0)\nprint('ESCAPED')", reason="not permitted"),
    "bpf": syscall(321, 0, 0, 0),
    "perf": syscall(298, 0, 0, 0, 0, 0),
    "io_uring": syscall(425, 8, "ctypes.create_string_buffer(200)"),
    "userfaultfd": syscall(323, 0),
    "keyring": syscall(250, 0, -3, 1),
    "handle of a file": syscall(304, 0, 0, 0),
    "personality": syscall(135, 0x0040000),
    "a second filter": syscall(317, 1, 0, 0),
    "reboot": syscall(169, 0xFEE1DEAD, 672274793, 0x4321FEDC, 0),
    "host name": Hostile("import socket\nsocket.sethostname('x')\nprint('ESCAPED')"),
    "clock": Hostile("import time\ntime.clock_settime(0, 0.0)\nprint('ESCAPED')"),
    "a 32-bit call": syscall(0x40000000 + 39),
    "jump to nowhere": Hostile("import ctypes\nctypes.string_at(0)", ("signal",), "SIGSEGV"),
    "machine code": Hostile(
        # mov eax, 41 (socket); mov edi, 2; mov esi, 1; xor edx, edx; syscall; ret
        "import ctypes, mmap\nm = mmap.mmap(-1, 4096, prot=7)\n"
        "m.write(bytes.fromhex('b829000000bf02000000be0100000031d20f05c3'))\n"
        "at = ctypes.addressof(ctypes.c_char.from_buffer(m))\n"
        "if ctypes.CFUNCTYPE(ctypes.c_long)(at)() >= 0: print('ESCAPED')",
        ("ok",),
    ),
    # metadata of the host
    "size of the secret": Hostile(
        "import os\nprint('ESCAPED', os.stat('HOST/secret'))", reason="Error"
    ),
    "existence of the secret": Hostile(
        "import os\nif os.path.lexists('HOST/secret') or os.access('HOST', 0): print('ESCAPED')",
        ("ok",),
    ),
    "size by statx": syscall(
        332, -100, "b'HOST/secret'", 0, 0xFFF, "ctypes.create_string_buffer(256)"
    ),
    "size by a path beside a descriptor": syscall(
        262, 0, "b'HOST/secret'", "ctypes.create_string_buffer(256)", 0x1000
    ),
    "size by a folder": Hostile(
        "import os\nd = os.open(os.path.dirname(os.__file__), 0)\n"
        "print('ESCAPED', os.stat('../' * 20 + 'HOST/secret'[1:], dir_fd=d))",
        reason="Error",
    ),
    "a path without reading": Hostile(
        "import os\nos.open('HOST/secret', os.O_PATH)\nprint('ESCAPED')"
    ),
    "the fourth access mode": Hostile("import os\nos.open('HOST/secret', 3)\nprint('ESCAPED')"),
    "go to the host": Hostile("import os\nos.chdir('HOST')\nprint('ESCAPED')", reason="Error"),
    "free space": Hostile(
        "import os\nos.statvfs(os.__file__)\nprint('ESCAPED')", reason="not permitted"
    ),
    "where links lead": Hostile("import os\nprint('ESCAPED', os.readlink('/proc/self/exe'))"),
    "name of the host": Hostile(
        "import os\nif os.uname().nodename != 'sandbox': print('ESCAPED')", ("ok",)
    ),
    "load of the machine": syscall(99, "ctypes.create_string_buffer(256)"),
    "which pages are cached": Hostile(
        f"{_SYSCALL}import mmap\nm = mmap.mmap(-1, 4096)\n"
        "at = ctypes.addressof(ctypes.c_char.from_buffer(m))\n"
        "page = ctypes.create_string_buffer(1)\n"
        "if call(27, ctypes.c_void_p(at), 4096, page) == 0: print('ESCAPED')",
        ("ok",),
    ),
    "drop cached pages": Hostile(
        "import os\nos.posix_fadvise(os.open(os.__file__, 0), 0, 0, 4)\nprint('ESCAPED')"
    ),
    "the keeper's descriptors": Hostile(
        "import os\nfor n in range(30):\n"
        "  try: open(f'/proc/{os.getppid()}/fd/{n}', 'w'); print('ESCAPED')\n"
        "  except OSError: pass",
        ("ok",),
    ),
    "the keeper's memory": Hostile(
        "import os\nopen(f'/proc/{os.getppid()}/mem', 'rb')\nprint('ESCAPED')"
    ),
    # truncation, which Landlock knows since its third version
    "truncate the secret": Hostile(
        "import os\nos.truncate('HOST/secret', 0)\nprint('ESCAPED')", reason="not permitted"
    ),
    "truncate what may be read": Hostile(
        "import os\nos.open(os.devnull, os.O_RDONLY | os.O_TRUNC)\nprint('ESCAPED')",
        reason="not permitted",
    ),
    "truncate by the fourth access mode": Hostile(
        "import os\nos.open(os.devnull, 3 | os.O_TRUNC)\nprint('ESCAPED')", reason="not permitted"
    ),
    # locks and watches of the host's files
    "lock the library": Hostile(f"{_LIBRARY}fcntl.flock(f, fcntl.LOCK_EX)\nprint('ESCAPED')"),
    "lock a range": Hostile(f"{_LIBRARY}fcntl.lockf(f, fcntl.LOCK_SH)\nprint('ESCAPED')"),
    "lock an open file": Hostile(f"{_LIBRARY}fcntl.fcntl(f, 37, bytes(32))\nprint('ESCAPED')"),
    "lease": Hostile(f"{_LIBRARY}fcntl.fcntl(f, fcntl.F_SETLEASE, 0)\nprint('ESCAPED')"),
    "watch a folder": Hostile(
        "import fcntl, os\nf = os.open(os.path.dirname(os.__file__), 0)\n"
        "fcntl.fcntl(f, fcntl.F_NOTIFY, 2)\nprint('ESCAPED')"
    ),
    "inotify": syscall(294, 0),
    "fanotify": syscall(300, 0, 0),
    # signals and settings of others
    "signal by a pipe's owner": Hostile(
        "import fcntl, os\nfcntl.fcntl(os.pipe()[0], fcntl.F_SETOWN, PARENT)\nprint('ESCAPED')"
    ),
    "signal by an owner's thread": Hostile(
        "import fcntl, os, struct\n"
        "fcntl.fcntl(os.pipe()[0], 15, struct.pack('ii', 1, PARENT))\nprint('ESCAPED')"
    ),
    "another signal than SIGIO": Hostile(
        "import fcntl, os\nfcntl.fcntl(os.pipe()[0], 10, 9)\nprint('ESCAPED')"
    ),
    "queue a signal": syscall(129, "PARENT", 0, "ctypes.create_string_buffer(128)"),
    "signal a thread": syscall(200, "PARENT", 0),
    "handle of a process": syscall(434, "PARENT", 0),
    "signal by a handle": syscall(424, 0, 0, 0, 0),
    "group of another": Hostile("import os\nos.getpgid(PARENT)\nprint('ESCAPED')", reason="Error"),
    "processors of another": Hostile(
        "import os\nos.sched_setaffinity(PARENT, {0})\nprint('ESCAPED')"
    ),
    "disc priority of another": syscall(251, 1, "PARENT", 0),
    # more than its share
    "two hundred threads": Hostile(
        "import threading, time\nthreading.stack_size(1 << 16)\n"
        "for i in range(200): threading.Thread(target=time.sleep, args=(9,), daemon=True).start()\n"
        "print('ESCAPED')",
        reason="can't start new thread",
    ),
    "a thread with descriptors of its own": syscall(56, 0x10000 | 0x800 | 0x100, 0, 0, 0, 0),
    "descriptors in flight": Hostile(
        "import socket\na, b = socket.socketpair()\n"
        "socket.send_fds(a, [b'x'], [0])\nprint('ESCAPED')"
    ),
    "huge pages": Hostile(
        "import mmap\nmmap.mmap(-1, 2 << 20, flags=0x40022)\nprint('ESCAPED')",
        reason="not permitted",
    ),
    "a datagram to the host": Hostile(
        "import socket as s\na, b = s.socketpair(s.AF_UNIX, s.SOCK_DGRAM)\n"
        "a.sendto(b'x', 'HOST/log')\nprint('ESCAPED')"
    ),
    "a stream to the host": Hostile(
        "import socket as s\na, b = s.socketpair()\na.sendto(b'x', 'HOST/log')\nprint('ESCAPED')"
    ),
    "run a file in memory": syscall(322, 0, "b''", 0, 0, 0x1000),
    "start again without a harness": Hostile(
        "import os, sys\nos.execv(sys.executable, ['p', '-I', '-S', '-c',"
        " \"print('ESCAPED', open('HOST/secret').read())\"])",
        ("error", "signal"),
    ),
}
