"""The inside of the sandbox: a script of its own, run as `python -I -S sandbox_child.py`, not imported.

It reads one JSON object from stdin, shuts itself in layer by layer, runs the program, and writes to the descriptor it
was given: first a line with the layers in place, then the parent's token if the program ran to its end, or the name
of what it raised. Needs the standard library only. Numbers of system calls are the kernel's (x86-64 and aarch64).
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import struct
import sys
import types
from typing import Any

EPERM, ENOSYS = 1, 38
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446
CLONE_THREAD = 0x00010000

# name: (x86-64, aarch64); None where an architecture has no such call.
REFUSED: dict[str, tuple[int, int | None]] = {
    "socket": (41, 198), "socketpair": (53, 199), "connect": (42, 203), "bind": (49, 200),
    "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281),
    "ptrace": (101, 117), "kill": (62, 129), "tkill": (200, 130), "pidfd_send_signal": (424, 424),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "setrlimit": (160, 164),
    "mount": (165, 40), "umount2": (166, 39), "chroot": (161, 51), "pivot_root": (155, 41),
    "unshare": (272, 97), "setns": (308, 268), "bpf": (321, 280), "perf_event_open": (298, 241),
    "io_uring_setup": (425, 425), "userfaultfd": (323, 282), "reboot": (169, 142), "kexec_load": (246, 104),
    "init_module": (175, 105), "finit_module": (313, 273), "add_key": (248, 217), "request_key": (249, 218),
    "keyctl": (250, 219), "mknod": (133, None), "mknodat": (259, 33), "chmod": (90, None), "fchmod": (91, 52),
    "fchmodat": (268, 53), "fchmodat2": (452, 452), "chown": (92, None), "fchown": (93, 55), "lchown": (94, None),
    "fchownat": (260, 54), "utime": (132, None), "utimes": (235, None), "futimesat": (261, None),
    "utimensat": (280, 88), "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7),
    "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16), "sethostname": (170, 161),
    "setdomainname": (171, 162), "settimeofday": (164, 170), "clock_settime": (227, 112), "adjtimex": (159, 171),
    "clock_adjtime": (305, 266), "swapon": (167, 224), "swapoff": (168, 225), "acct": (163, 89),
    "setpriority": (141, 140), "sched_setscheduler": (144, 119), "sched_setaffinity": (203, 122),
}  # fmt: skip
CLONE, CLONE3, TGKILL, PRLIMIT = (56, 220), (435, 435), (234, 131), (302, 261)
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column of the tables, AUDIT_ARCH


def main() -> None:
    """Reads the request, shuts the door, runs the program."""
    request = json.loads(sys.stdin.buffer.read())
    result = int(sys.argv[1])
    layers = shut_in(request)
    os.write(result, (json.dumps(layers) + "\n").encode())
    token, program = request["token"], request["program"]
    del request
    module = types.ModuleType("program")
    sys.modules["program"] = module  # where dataclasses and pickle look for the program's own names
    try:
        exec(compile(program, "program.py", "exec", dont_inherit=True), module.__dict__)
    except BaseException as error:  # SystemExit too: a program that leaves early has not passed
        os.write(result, type(error).__name__.encode()[:100])
        os._exit(1)
    os.write(result, token.encode())
    os._exit(0)


def shut_in(request: dict[str, Any]) -> list[str]:
    """Applies every layer that this system has; the names of those in place."""
    work, readable, wanted = request["work"], request["readable"], request["layers"]
    layers = []
    os.chdir(work)
    os.environ.clear()
    if "limits" in wanted and limit(request["limits"]):
        layers.append("limits")
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        drop_capabilities(libc)
        if "landlock" in wanted and landlock(libc, work, readable):
            layers.append("landlock")
        if "seccomp" in wanted and seccomp(libc):
            layers.append("seccomp")
    if "audit" in wanted:
        sys.addaudithook(auditor(work, readable))
        layers.append("audit")
    return layers


# --- limits -------------------------------------------------------------------------------------------------


def limit(limits: dict[str, int]) -> bool:
    """Hard limits of this process; False where the system refuses one."""
    try:
        import resource
    except ImportError:
        return False
    whole = True
    for name, value in limits.items():
        try:
            kind = getattr(resource, name)
            resource.setrlimit(kind, (value, value))
        except (AttributeError, ValueError, OSError):
            whole = False
    return whole


# --- Linux --------------------------------------------------------------------------------------------------


def drop_capabilities(libc: Any) -> None:
    """Root's powers, if it has any: limits and file modes then hold for it too."""
    header = struct.pack("Ii", 0x20080522, 0)
    libc.capset(header, struct.pack("6I", 0, 0, 0, 0, 0, 0))


def landlock(libc: Any, work: str, readable: list[str]) -> bool:
    """Only `readable` can be opened, only `work` written; False where the kernel has no Landlock."""
    version = libc.syscall(LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1)
    if version < 1:
        return False
    files = (1 << (13 + (version >= 2) + (version >= 3))) - 1 | ((version >= 5) << 15)
    attributes = struct.pack("QQQ", files, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    rules = libc.syscall(LANDLOCK_CREATE, attributes, ctypes.c_size_t(size), 0)
    if rules < 0:
        return False
    read_file, read_folder = 1 << 2, 1 << 3
    for path, access in [(work, files), *((path, read_file | read_folder) for path in readable)]:
        try:
            descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        if not os.path.isdir(path):
            access &= read_file
        libc.syscall(LANDLOCK_ADD, rules, 1, struct.pack("=Qi", access, descriptor), 0)
        os.close(descriptor)
    closed = libc.syscall(LANDLOCK_RESTRICT, rules, 0) == 0
    os.close(rules)
    return bool(closed)


def seccomp(libc: Any) -> bool:
    """No network, no other process, no change of what others own; False where the kernel has no filters."""
    if platform.machine() not in ARCHITECTURES:
        return False
    column, architecture = ARCHITECTURES[platform.machine()]
    filters = assemble(column, architecture)
    code = b"".join(struct.pack("HBBI", *line) for line in filters)
    buffer = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("HxxxxxxP", len(filters), ctypes.addressof(buffer))
    return bool(libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, program, 0, 0) == 0)


def assemble(column: int, architecture: int) -> list[tuple[int, int, int, int]]:
    """The filter: (operation, jump if true, jump if false, value) of each instruction."""
    load, equal, any_bit, returns = 0x20, 0x15, 0x45, 0x06
    allow, kill, refuse = 0x7FFF0000, 0x80000000, 0x00050000
    number, arch, argument = 0, 4, lambda index: 16 + 8 * index  # offsets in struct seccomp_data
    lines = [(load, 0, 0, arch), (equal, 1, 0, architecture), (returns, 0, 0, kill), (load, 0, 0, number)]
    if column == 0:  # the x32 calls of x86-64 have this bit
        lines += [(any_bit, 0, 1, 0x40000000), (returns, 0, 0, refuse | ENOSYS)]
    for columns in REFUSED.values():
        call = columns[column]
        if call is not None:
            lines += [(equal, 0, 1, call), (returns, 0, 0, refuse | EPERM)]
    # glibc falls back from clone3 to clone, whose flags can be looked at: threads only.
    lines += [(equal, 0, 1, CLONE3[column]), (returns, 0, 0, refuse | ENOSYS)]
    threads = [(load, 0, 0, argument(0)), (any_bit, 1, 0, CLONE_THREAD), (returns, 0, 0, refuse | EPERM)]
    lines += [(equal, 0, len(threads) + 1, CLONE[column]), *threads, (returns, 0, 0, allow)]
    own = [(load, 0, 0, argument(0)), (equal, 1, 0, os.getpid()), (returns, 0, 0, refuse | EPERM)]
    lines += [(equal, 0, len(own) + 1, TGKILL[column]), *own, (returns, 0, 0, allow)]
    asks = [(load, 0, 0, argument(2)), (equal, 0, 2, 0), (load, 0, 0, argument(2) + 4), (equal, 1, 0, 0)]
    asks += [(returns, 0, 0, refuse | EPERM)]  # a new limit is given: its address is not null
    lines += [(equal, 0, len(asks) + 1, PRLIMIT[column]), *asks, (returns, 0, 0, allow)]
    return [*lines, (returns, 0, 0, allow)]


# --- Python -------------------------------------------------------------------------------------------------

FORBIDDEN = (
    "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "os.kill",
    "os.killpg", "os.chmod", "os.chown", "os.chflags", "os.setxattr", "os.removexattr", "os.utime", "os.mknod",
    "pty.", "socket.", "ctypes.", "resource.", "signal.pthread_kill", "urllib.", "http.client.", "ftplib.",
    "smtplib.", "telnetlib.", "imaplib.", "poplib.", "nntplib.", "webbrowser.", "winreg.", "fcntl.", "syslog.",
    "gc.get_objects", "gc.get_referrers",
)  # fmt: skip
WRITES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "shutil.")


def auditor(work: str, readable: list[str]) -> Any:
    """A hook that refuses files outside, processes, the network and ctypes. Holds where no kernel layer does."""
    real = os.path.realpath
    own, others = real(work), tuple(real(path) for path in readable)
    is_text = (str, bytes, os.PathLike)

    def inside(path: Any, folders: tuple[str, ...]) -> bool:
        if not isinstance(path, is_text):
            return True  # a descriptor that is open already
        full = real(os.fsdecode(path))
        return any(full == folder or full.startswith(folder + os.sep) for folder in folders)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event.startswith(FORBIDDEN):
            raise PermissionError(f"{event} is not allowed here")
        if event == "open":
            path, mode, flags = (*arguments, None, None)[:3]
            writes = isinstance(mode, str) and mode.strip("rbtU") != "" or bool((flags or 0) & 3)
            if not inside(path, (own,) if writes else (own, *others)):
                raise PermissionError("a file outside of the sandbox's folder")
        elif event in ("os.listdir", "os.scandir", "os.chdir", "glob.glob"):
            if arguments and not inside(arguments[0], (own, *others)):
                raise PermissionError("a folder outside of the sandbox's")
        elif event.startswith(WRITES):
            if not all(inside(path, (own,)) for path in arguments if isinstance(path, is_text)):
                raise PermissionError("a file outside of the sandbox's folder")

    return hook


if __name__ == "__main__":
    main()
