#!/usr/bin/env bash
# torch 2.13.0: TCPStore.set() returns before the server has the value. A process that sets a key and then tells another
# one, by whatever other way, that it is there, may be wrong: under load the other one's check() finds nothing. A check()
# of the same client after its set() is answered in order, and so waits until the value is there.
#
# What is seen: with the server process stopped, set() returns at once and check() does not; when the server goes on,
# check() answers True. Fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 numpy
cat > "$work/server.py" <<'PY'
import time
import torch.distributed as dist
store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
print(store.port, flush=True)
time.sleep(120)
PY
cat > "$work/client.py" <<'PY'
import signal, subprocess, sys, threading, time
import torch
import torch.distributed as dist

with subprocess.Popen([sys.executable, sys.argv[1]], stdout=subprocess.PIPE, text=True) as server:
    try:
        store = dist.TCPStore("127.0.0.1", int(server.stdout.readline()), is_master=False)
        store.set("warm", "up")
        assert store.check(["warm"])
        server.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        store.set("key", "value")
        took = time.monotonic() - began
        answers = []
        asking = threading.Thread(target=lambda: answers.append(store.check(["key"])))
        asking.start()
        asking.join(2)
        waits = asking.is_alive()
        server.send_signal(signal.SIGCONT)
        asking.join(60)
        print(f"torch {torch.__version__}: with the server stopped, set() returned after {took:.3f} s;")
        print(f"check() was waiting after 2 s: {waits}; it answered, once the server went on: {answers}")
        sys.exit(not (took < 1 and waits and answers == [True]))
    finally:
        server.kill()
PY
"$work/venv/bin/python" "$work/client.py" "$work/server.py"
