"""Two hosts, n1 and n2, on this machine: reached by ssh, and as a SLURM cluster. Needs root.

Everything lies in one folder and ends with it, except for two lines in /etc/hosts, which are taken out again.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from forked import ENVIRONMENT, free_port

PROGRAMS = {
    "sshd": "openssh-server",
    "ssh": "openssh-client",
    "pdsh": "pdsh",
    "slurmctld": "slurm-wlm",
    "munged": "munge",
}
HOSTS = Path("/etc/hosts")
MARK = "# two hosts of a test"

SLURM = """ClusterName=drill
SlurmctldHost={hostname}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
KillWait=30
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=batch_sched_delay=1,sched_interval=5
ReturnToService=2
NodeName=n1 NodeHostname={hostname} NodeAddr=127.0.0.1 Port={ports[0]} CPUs=2 Gres=gpu:1 State=UNKNOWN
NodeName=n2 NodeHostname={hostname} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 Gres=gpu:1 State=UNKNOWN
PartitionName=low Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE
PartitionName=high Nodes=n[1-2] MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""

SSHD = """Port {port}
ListenAddress 127.0.0.1
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
PidFile {folder}/sshd.pid
StrictModes no
UsePAM no
"""

SSH = """Host n1 n2
  HostName 127.0.0.1
  Port {port}
  IdentityFile {folder}/key
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
Host n3
  HostName 127.0.0.1
  Port 1
"""


def missing() -> str:
    """Why there can be no such hosts here; empty where there can."""
    lacking = sorted({package for program, package in PROGRAMS.items() if not shutil.which(program)})
    if lacking:
        return f"needs Debian's {' '.join(lacking)}"
    return "" if os.geteuid() == 0 else "needs root, to start daemons and to name two hosts in /etc/hosts"


def _daemon(*command: object, **options: object) -> subprocess.Popen:
    return subprocess.Popen(
        [str(word) for word in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **options
    )


def _end(daemons: list[subprocess.Popen]) -> None:
    for daemon in reversed(daemons):
        daemon.terminate()
    for daemon in daemons:
        try:
            daemon.wait(timeout=20)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()


@contextlib.contextmanager
def hosts(folder: Path) -> Iterator[dict[str, str]]:
    """The environment in which `ssh n1` works; n3 has a name and does not answer."""
    port = free_port()
    for name in ("host_key", "key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    (folder / "sshd_config").write_text(SSHD.format(port=port, folder=folder))
    (folder / "ssh_config").write_text(SSH.format(port=port, folder=folder))
    (folder / "programs").mkdir()
    wrapper = folder / "programs/ssh"
    wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/ssh_config "$@"\n')
    wrapper.chmod(0o755)
    Path("/run/sshd").mkdir(exist_ok=True)
    before = HOSTS.read_text()
    HOSTS.write_text(before + "".join(f"127.0.0.1 {name} {MARK}\n" for name in ("n1", "n2", "n3")))
    sshd = _daemon(shutil.which("sshd"), "-D", "-f", folder / "sshd_config")
    try:
        yield {**ENVIRONMENT, "PATH": f"{folder}/programs:{Path(sys.executable).parent}:{os.environ['PATH']}"}
    finally:
        _end([sshd])
        lines = HOSTS.read_text().splitlines(keepends=True)
        HOSTS.write_text("".join(line for line in lines if MARK not in line))


@contextlib.contextmanager
def slurm(folder: Path, environment: dict[str, str]) -> Iterator[dict[str, str]]:
    """The environment in which sbatch finds n1 and n2, one GPU each by name, in partitions low and high."""
    hostname = subprocess.run(["hostname", "-s"], capture_output=True, text=True).stdout.strip()
    text = SLURM.format(folder=folder, hostname=hostname, port=free_port(), ports=(free_port(), free_port()))
    (folder / "slurm.conf").write_text(text)
    (folder / "gres.conf").write_text(f"NodeName=n[1-2] Name=gpu File={folder}/gpu0\n")
    (folder / "gpu0").touch()
    for name in ("state", "spool-n1", "spool-n2"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    environment = {**environment, "SLURM_CONF": str(folder / "slurm.conf")}
    daemons = [
        _daemon(
            shutil.which("munged"), "--foreground", "--force", f"--socket={folder}/munge.socket",
            f"--key-file={key}",
            f"--pid-file={folder}/munged.pid", f"--log-file={folder}/munged.log",
            f"--seed-file={folder}/munged.seed",
        )
    ]  # fmt: skip
    try:
        wait_for(lambda: (folder / "munge.socket").exists())
        daemons.append(_daemon(shutil.which("slurmctld"), "-D", env=environment))
        daemons += [
            _daemon(shutil.which("slurmd"), "-D", "-N", name, env=environment) for name in ("n1", "n2")
        ]
        wait_for(
            lambda: (
                ask(environment, "sinfo", "--noheader", "--partition=low", "--format=%T %D").split()
                == ["idle", "2"]
            )
        )
        yield environment
    finally:
        subprocess.run(["scancel", "--user=root"], env=environment, stderr=subprocess.DEVNULL)
        time.sleep(3)
        _end(daemons)


def ask(environment: dict[str, str], *command: str) -> str:
    return subprocess.run(command, env=environment, capture_output=True, text=True).stdout


def wait_for(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.2)
