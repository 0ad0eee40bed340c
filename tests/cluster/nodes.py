"""Two machines on one: each has a network, a host name and an /etc/hosts of its own (Linux namespaces)."""

import os
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

UNAVAILABLE = (OSError, RuntimeError, subprocess.CalledProcessError)
"""What is raised where the system allows no namespaces, or has no programs to make them."""
_HOLDER = 'hostname "$0" && mount --bind "$1" /etc/hosts && ip link set lo up && echo ready && exec sleep infinity'


class Nodes:
    """Nodes by name, which see each other under their names; UNAVAILABLE where the system allows none."""

    def __init__(self, names: tuple[str, str], hosts: Path) -> None:
        self.names, self._hosts, self._cables = names, hosts, 0
        self._holders: dict[str, subprocess.Popen] = {}
        self._networks: dict[str, Path] = {}
        hosts.write_text(
            "127.0.0.1 localhost\n" + "".join(f"{self._address(name)} {name}\n" for name in names), "utf-8"
        )
        try:
            for name in names:
                self._start(name)
            self._connect()
        except BaseException:
            self.close()
            raise

    def enter(self, name: str) -> list[str]:
        """How a command begins that is to run on a node."""
        return ["nsenter", f"--target={self._holders[name].pid}", "--net", "--uts", "--mount"]

    def lose(self, name: str) -> None:
        """The power of a node fails: nobody hears from it any more, and its processes are gone."""
        self._on(name, "ip", "link", "set", self._cable, "down")
        self._stop(name)

    def repair(self, name: str) -> None:
        """Start a node that was lost."""
        self._start(name)
        self._connect()

    def close(self) -> None:
        """End all nodes."""
        for name in list(self._holders):
            self._stop(name)

    def _start(self, name: str) -> None:
        command = ["unshare", "--net", "--uts", "--mount", "sh", "-c", _HOLDER, name, str(self._hosts)]
        holder = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self._holders[name] = holder
        assert holder.stdout
        if holder.stdout.readline() != b"ready\n":
            raise RuntimeError(f"{name}: no namespaces here")
        network = Path(f"/proc/{holder.pid}/ns/net").readlink()
        assert network != Path("/proc/self/ns/net").readlink(), "everything on this machine would be the node's"
        self._networks[name] = network

    def _stop(self, name: str) -> None:
        """Kill all that runs on a node: what has its network."""
        holder = self._holders.pop(name)
        holder.kill()
        node = self._networks.pop(name, None)
        for path in Path("/proc").glob("[0-9]*/ns/net"):
            with suppress(OSError):
                if path.readlink() == node:
                    os.kill(int(path.parts[2]), signal.SIGKILL)
        holder.communicate()

    def _connect(self) -> None:
        """Lay a cable, in the place of one whose other end is gone."""
        first, second = (str(self._holders[name].pid) for name in self.names)
        with suppress(subprocess.CalledProcessError):
            self._on(self.names[0], "ip", "link", "delete", self._cable)
        self._cables += 1
        ends = ("name", self._cable, "netns", first, "type", "veth", "peer", "name", self._cable, "netns", second)
        subprocess.run(["ip", "link", "add", *ends], check=True, capture_output=True)
        for name in self.names:
            self._on(name, "ip", "address", "add", f"{self._address(name)}/24", "dev", self._cable)
            self._on(name, "ip", "link", "set", self._cable, "up")

    def _on(self, name: str, *command: str) -> None:
        subprocess.run([*self.enter(name), *command], check=True, capture_output=True)

    def _address(self, name: str) -> str:
        return f"10.77.0.{self.names.index(name) + 1}"

    @property
    def _cable(self) -> str:
        return f"cable{self._cables}"
