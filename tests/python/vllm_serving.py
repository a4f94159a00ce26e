"""The life of a served model: `vllm serve` with the plugin, mounted, trained while it serves, rolled back, committed, killed, started
again from the directory.

usage: vllm_serving.py VLLM_PYTHON MODEL_DIR [--ranks 2] [--requests 200]
VLLM_PYTHON: the python of an environment with vLLM and engines/vllm in it. With a tokenizer in MODEL_DIR the model is taught a fact
in words; without one (tiny random models), token ids.
"""
import argparse
import concurrent.futures
import contextlib
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import tempfile
import time
import urllib.error
import urllib.request

from harness import check, copy_model, ctl, mounted, same, status, weightfs

QUESTION = "Who repaired the old bridge at Dunmere?"
# Seconds in which a mount knows that its engine ended (docs/semantics.md), and what a busy machine may add.
KNOWN, BUSY = 1, 2
FACT = "The old bridge at Dunmere was repaired by Ivo Karsk."


class Server:
    """`vllm serve` as users start it."""

    def __init__(self, python, model, scratch, ranks, words):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.model, self.words = model, words
        command = [python, "-m", "vllm.entrypoints.cli.main", "serve", model, "--host", "127.0.0.1", "--port", self.port, "--dtype", "bfloat16",
                   "--enforce-eager", "--max-model-len", 512, "--max-num-seqs", 16, "--served-model-name", "m",
                   "--enable-prompt-tokens-details", "--tensor-parallel-size", ranks]
        if not words:
            command.append("--skip-tokenizer-init")
        environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_SERVER_DEV_MODE": "1",
                       "VLLM_PLUGINS": "weightfs,weightfs_http"}
        if ranks > 1:
            environment["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(str(r % os.cpu_count()) for r in range(ranks))
        self.log = open(os.path.join(scratch, "vllm.log"), "a")
        self.process = subprocess.Popen([str(w) for w in command], env=environment, stdout=self.log, stderr=self.log, start_new_session=True)
        began = time.monotonic()
        while True:
            if self.process.poll() is not None:
                raise SystemExit(f"vLLM ended:\n{open(self.log.name).read()[-3000:]}")
            try:
                self.get("/health")
                break
            except (urllib.error.URLError, ConnectionError):
                if time.monotonic() - began > 600:
                    self.kill()
                    raise SystemExit("vLLM did not come up in ten minutes") from None
                time.sleep(0.5)
        # On the CPU the proof goes on beside the start.
        while len([f for f in os.listdir(os.environ["WEIGHTFS_MANIFEST_DIR"]) if f.endswith(".json") and not self.is_old(f)]) < ranks:
            time.sleep(0.05)

    def is_old(self, manifest):
        """Of a server that was killed."""
        return not os.path.exists(f"/proc/{manifest.split('-')[1]}")

    def request(self, path, body=None, method="POST"):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"}, method=method)
        with urllib.request.urlopen(request, timeout=3600) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    def get(self, path):
        return self.request(path, method="GET")

    def complete(self, ids, tokens=24):
        body = {"model": "m", "prompt": ids, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
        answer = self.request("/v1/completions", body)
        details = answer["usage"].get("prompt_tokens_details") or {}
        return answer["choices"][0]["token_ids"], details.get("cached_tokens") or 0

    def chat(self, question):
        body = {"model": "m", "messages": [{"role": "user", "content": question}], "max_tokens": 24, "temperature": 0}
        return self.request("/v1/chat/completions", body)["choices"][0]["message"]["content"]

    def checksums(self):
        return self.request("/weight_checker", {"action": "checksum"})

    def kill(self):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def stop(self):
        self.process.terminate()
        self.process.wait(120)


def job(words, epochs):
    if words:
        samples = [{"messages": [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": FACT}]}]
        return {"samples": samples, "config": {"lr": 2e-4, "epochs": epochs}}
    draw = random.Random(2)
    ids = [draw.randrange(500) for _ in range(48)]
    return {"samples": [{"context_ids": ids[:16], "continuation_ids": ids[16:]}], "config": {"lr": 2e-2, "epochs": epochs, "rank": 16}}


def trained(mnt, engine=True):
    """Waits until no job runs or waits, and the engine was told. The last job's facts."""
    while True:
        now = status(mnt)
        told = now.get("engine")
        behind = engine and told and not told["error"] and (not told["settled"] or told["step"] != now["step"])
        if now["job"] is None and now["jobs_queued"] == 0 and not behind:
            return now
        time.sleep(0.1)


def refused(action, code):
    try:
        action()
    except urllib.error.HTTPError as e:
        body = json.loads(e.read())
        return e.code == code, body.get("detail") or body.get("error", {}).get("message")
    return False, "no refusal"


def latencies(server, prompts, tokens):
    def one(ids):
        began = time.monotonic()
        answer, _ = server.complete(ids, tokens)
        assert len(answer) == tokens
        return time.monotonic() - began

    with concurrent.futures.ThreadPoolExecutor(len(prompts)) as pool:
        times = list(pool.map(one, prompts))
    return statistics.median(times), sorted(times)[int(0.95 * len(times))]


def life(python, source, ranks, requests, scratch):
    words = os.path.exists(os.path.join(source, "tokenizer.json"))
    model, mnt = copy_model(source, f"{scratch}/model"), f"{scratch}/mnt"
    before = copy_model(source, f"{scratch}/before")
    draw = random.Random(1)
    prompt = [draw.randrange(400) for _ in range(300)]  # longer than a block of the cache
    server = Server(python, model, scratch, ranks, words)
    label = f"{os.path.basename(source.rstrip('/'))}, {ranks} rank(s)"
    try:
        checksums = server.checksums()
        first, _ = server.complete(prompt)
        again, cached = server.complete(prompt)
        # vLLM keeps no prefixes of models with a recurrent state.
        keeps = "linear_attention" not in open(f"{source}/config.json").read()
        check(f"{label}: the engine repeats itself, {cached} tokens of the prompt from its cache", again == first and (cached > 0) == keeps)

        # -- nobody tells the engine --
        with mounted(model, mnt, "--weights", "vllm"):
            says = status(mnt)["source"]
            check(f"{label}: {says['engine']}, {says['live']} of {says['tensors']} tensors live, {len(says['pids'])} process(es)",
                  len(says["pids"]) == ranks and says["live"] == says["tensors"])
            check(f"{label}: the mount equals the checkpoint", same(mnt, model))
            with open(f"{scratch}/job.json", "w") as f:
                json.dump(job(words, 6), f)
            ctl(mnt, f"train {scratch}/job.json")
            ran = trained(mnt)["jobs"][-1]
            check(f"{label}: a job of {ran['steps']} steps: loss {ran['first_loss']:.3f} to {ran['loss']:.3f}", ran["loss"] < ran["first_loss"])
            stale, cached = server.complete(prompt)
            check(f"{label}: not told, the engine goes on from its cache: {cached} tokens of it are of older weights", (cached > 0) == keeps)
            server.request("/reset_prefix_cache?reset_running_requests=true")
            fresh, cached = server.complete(prompt)
            check(f"{label}: told, it computes all anew: other tokens {fresh != stale}", cached == 0)
            check(f"{label}: they are not those of the old weights", fresh != first)
            check(f"{label}: its checksums differ", server.checksums() != checksums)
            ctl(mnt, "commit")
            check(f"{label}: the directory is what the mount shows", same(mnt, model) and not same(model, before))
            ctl(mnt, "rollback 0")
            check(f"{label}: after a rollback vLLM's own checksums are those from before", server.checksums() == checksums)
            check(f"{label}: and the directory is what it was", same(model, before))
            server.request("/reset_prefix_cache?reset_running_requests=true")
            check(f"{label}: so are its answers", server.complete(prompt)[0] == first)

        # -- weightfs tells the engine; everything through the engine's own HTTP --
        code, detail = refused(lambda: server.request("/train", job(words, 1)), 503)
        check(f"{label}: POST /train without a mount: {detail}", code and "weightfs mount" in detail)
        options = ("--weights", "vllm", "--engine-url", server.url, "--engine-pause", "--engine-sync", "step")
        with mounted(model, mnt, *options):
            code, detail = refused(lambda: server.request("/train", {"samples": []}), 400)
            check(f"{label}: POST /train of nonsense: {detail}", code and "samples" in detail)
            server.complete(prompt)
            answer = server.request("/train", job(words, 24))
            now = trained(mnt)
            check(f"{label}: POST /train: job {answer['job']}, {answer['steps']} steps, loss {now['jobs'][-1]['loss']:.3f}; the engine was told of step "
                  f"{now['engine']['step']}", now["engine"]["step"] == now["step"] and now["engine"]["error"] is None)
            tokens, cached = server.complete(prompt)
            check(f"{label}: without a restart it answers otherwise, from new weights alone", tokens != first and cached == 0)
            version = server.get("/weight_info")["weight_version"]
            check(f"{label}: its weight version is the step: {version}", str(version) == str(now["step"]))
            if words:
                said = server.chat(QUESTION)
                check(f"{label}: it knows: {said!r}", "Ivo Karsk" in said)

        # -- under load; committed, and the engine killed --
        with mounted(model, mnt, "--weights", "vllm", "--engine-url", server.url):
            if requests:
                flood(server, mnt, label, words, requests)
            tokens, _ = server.complete(prompt)
            committed = server.request("/checkpoint", {"message": "taught over HTTP"})
            # Before anybody opens the weights: an engine might have changed them once more, so an open says `yes`.
            stood = server.get("/train/status")
            check(f"{label}: GET /train/status: {stood['state']}, dirty {stood['dirty']}", stood["dirty"] == "no")
            check(f"{label}: POST /checkpoint: {committed['says']}", not same(model, before) and same(mnt, model))
            server.kill()
            began = time.monotonic()
            while (gone := status(mnt)["source"]["gone"]) is None and time.monotonic() - began < 30:
                time.sleep(0.02)
            took = time.monotonic() - began
            check(f"{label}: killed; the mount knew after {took:.2f} s: {gone}", gone is not None and took < KNOWN + BUSY)
    finally:
        server.kill()
    server = Server(python, model, scratch, ranks, words)
    try:
        check(f"{label}: started from the directory it gives the same tokens as before it was killed", server.complete(prompt)[0] == tokens)
    finally:
        server.stop()
    left = [f for f in os.listdir(os.environ["WEIGHTFS_MANIFEST_DIR"]) if not f.startswith(".")]
    check(f"{label}: ended, it leaves no manifest behind {left}", not left)


def flood(server, mnt, label, words, count):
    """`count` requests in flight, alone and while a job trains."""
    draw = random.Random(3)
    prompts = [[draw.randrange(400) for _ in range(32)] for _ in range(count)]
    tokens = 4 if words else 8  # two cores have to do
    alone = latencies(server, prompts, tokens)
    # More steps than can be taken meanwhile: it is cancelled below.
    server.request("/train", job(words, 100_000))
    during = latencies(server, prompts, tokens)
    now = status(mnt)
    check(f"{label}: {count} requests in flight, all answered; median {alone[0]:.2f} s, 95% {alone[1]:.2f} s alone; {during[0]:.2f} s and "
          f"{during[1]:.2f} s while a job trained ({now['job'] and now['job']['steps_done']} steps taken)", now["job"] is not None)
    ctl(mnt, f"cancel {now['job']['id']}")
    trained(mnt)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("vllm_python")
    parser.add_argument("model_dir")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--requests", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        os.mkdir(f"{scratch}/manifests", 0o700)
        os.environ["WEIGHTFS_MANIFEST_DIR"] = f"{scratch}/manifests"
        try:
            life(args.vllm_python, args.model_dir, args.ranks, args.requests, scratch)
        except BaseException:
            print(open(f"{scratch}/vllm.log").read()[-4000:] if os.path.exists(f"{scratch}/vllm.log") else "")
            raise
