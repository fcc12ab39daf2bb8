"""Starts one program and makes sure that it does not outlive the node. Run as a script, never imported by the node.

    python -I -S guard.py PROGRAM [ARGUMENT]...

Standard input is one end of a socket pair whose only other end the node holds; `process.py` is that other end. The
kernel closes the node's end however the node ends, kill -9 included, so an end of file there means: kill the program.

Why a process between: `PR_SET_PDEATHSIG` alone is not enough. It exists on Linux only, and it fires when the *thread*
that forked ends, so a program started from a worker thread dies too early. Here the guard's only thread forks, and the
guard's own death, by whatever cause, kills the program. On macOS, where there is no such signal, the program outlives a
guard that is killed -9 on its own; the node, which knows the pid, then kills it.

What is said on the socket pair, as lines of ASCII:

    guard → node    pid N           the program runs
                    error TEXT      it could not be started; the last line
                    exit N          it ended with status N, or by signal -N; the last line
    node → guard    T, K, I         one byte each: send SIGTERM, SIGKILL, SIGINT to the program

The program gets /dev/null as its standard input, shares standard output and error with the guard, leads a process group
of its own, and ignores SIGPIPE: rpc-server otherwise dies when a client vanishes in the middle of an answer. When it
ends, what is left of its group is killed; on Linux, so is every other descendant, since ninja for one gives each
compiler a group of its own. Only the standard library is used, and as little of it as possible,
because this runs before every start: about 20 ms.
"""

import os
import select
import signal
import sys

if sys.platform == "linux":
    import ctypes

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
SIGNALS = {"T": signal.SIGTERM, "K": signal.SIGKILL, "I": signal.SIGINT}


def main(argv: list[str]) -> int:
    """Run `argv` until it ends or the node does. Returns the exit status to end with."""
    wake, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.signal(signal.SIGCHLD, lambda signum, frame: None)  # else the wake-up below is never written
    signal.set_wakeup_fd(wake_write)
    failure, failure_write = os.pipe()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # orphans become our children
    guard = os.getpid()
    child = os.fork()
    if child == 0:
        _become(argv, guard, failure_write)
    os.close(failure_write)
    reason = os.read(failure, 4096)  # ends at once when the program starts: the other end closes on exec
    if reason:
        os.waitpid(child, 0)
        _say(b"error " + reason.replace(b"\n", b" "))
        return 127
    _say(b"pid %d" % child)
    return _watch(child, wake)


def _become(argv: list[str], guard: int, failure: int) -> None:
    try:
        os.setpgid(0, 0)
        if sys.platform == "linux":
            if ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
                raise OSError("the kernel refused PR_SET_PDEATHSIG")
            if os.getppid() != guard:  # it died before the line above
                os._exit(127)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.execv(argv[0], argv)
    except OSError as exc:
        os.write(failure, (exc.strerror or str(exc)).encode()[:4096])
    finally:
        os._exit(127)


def _watch(child: int, wake: int) -> int:
    poller = select.poll()
    poller.register(0, select.POLLIN)
    poller.register(wake, select.POLLIN)
    while True:
        for fd, _ in poller.poll():
            if fd == wake:
                os.read(wake, 512)
                if (status := _reap(child)) is not None:
                    return _finish(status)
                continue
            try:
                orders = os.read(0, 64)
            except OSError:
                orders = b""
            if not orders:
                _signal_group(child, signal.SIGKILL)
                return _finish(_reap_killed(child))
            for order in orders.decode("ascii", "replace"):
                if order in SIGNALS:
                    _signal_group(child, SIGNALS[order])


def _reap(child: int) -> int | None:
    """Reap whatever has ended. The status of `child`, or minus the number of its signal; `None` while it runs."""
    if not hasattr(os, "waitid"):  # macOS before Python 3.13; there are no adopted orphans there
        pid, status = os.waitpid(child, os.WNOHANG)
        return None if pid == 0 else os.waitstatus_to_exitcode(status)
    while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None:
        if ended.si_pid == child:
            return _reap_killed(child)
        os.waitpid(ended.si_pid, 0)
    return None


def _reap_killed(child: int) -> int:
    _signal_group(
        child, signal.SIGKILL
    )  # a dead leader that is not yet reaped keeps its number from being reused
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _kill_descendants() -> None:
    """Kill our children, then theirs, which thereby become ours, until there are none."""
    path = f"/proc/self/task/{os.getpid()}/children"
    while True:
        try:
            with open(path) as file:
                children = file.read().split()
            for child in children:
                os.kill(int(child), signal.SIGKILL)
            for child in children:
                os.waitpid(int(child), 0)
        except OSError:  # not Linux
            return
        if not children:
            return


def _finish(status: int) -> int:
    _kill_descendants()
    _say(b"exit %d" % status)
    return status if status >= 0 else 128 - status


def _signal_group(leader: int, signum: int) -> None:
    try:
        os.killpg(leader, signum)
    except (ProcessLookupError, PermissionError):  # macOS says "not permitted" for a group of zombies
        return


def _say(line: bytes) -> None:
    try:
        os.write(0, line + b"\n")
    except OSError:  # the node is gone; there is nobody to tell
        return


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
