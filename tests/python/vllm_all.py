"""Everything about vLLM in one command: makes the models, mounts every family, plays the life of served ones.

usage: vllm_all.py VLLM_PYTHON [--bounded]     (VLLM_PYTHON: the python of an environment with vLLM and engines/vllm in it)
--bounded: one small model's life only, two or three minutes.
WEIGHTFS_MODELS: a folder with the models by name (qwen3, llama, … smollm2). What is not there is made in target/models, once, by
../shared/models where that is.
"""
import os
import subprocess
import sys

from harness import HERE, ROOT

FAMILIES = ["llama", "qwen2", "qwen3", "qwen3-tied", "qwen3_5-text", "qwen3_5", "qwen3-next", "gemma3", "olmo2", "phi3", "gpt-oss",
            "deepseek-v3", "qwen3-moe"]
MAKERS = os.path.join(os.path.dirname(ROOT), "shared", "models")


def model(python, name):
    target = os.path.join(ROOT, "target", "models", name)
    named = os.environ.get("WEIGHTFS_MODELS")
    for ready in ([os.path.join(os.path.abspath(named), name)] if named else []) + [target]:
        if os.path.exists(os.path.join(ready, "config.json")):
            return ready
    if not os.path.isdir(MAKERS):
        sys.exit(f"there is no model {name}: set WEIGHTFS_MODELS to a folder that has it (vllm_families.py and vllm_serving.py take any model "
                 "directory)")
    os.makedirs(os.path.dirname(target), exist_ok=True)
    words = [os.path.join(MAKERS, "smollm2"), target] if name == "smollm2" else [os.path.join(MAKERS, "tiny"), name, target]
    subprocess.run([python, *words], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return target


def run(script, python, *words):
    print(f"-- {script} {' '.join(words)}", flush=True)
    subprocess.run([sys.executable, os.path.join(HERE, script), python, *words], check=True)


if __name__ == "__main__":
    python, *flags = sys.argv[1:]
    run("vllm_serving.py", python, model(python, "qwen3"), "--requests", "50")
    if "--bounded" not in flags:
        run("vllm_families.py", python, *(model(python, family) for family in FAMILIES))
        run("vllm_serving.py", python, model(python, "qwen3"), "--ranks", "2")
        run("vllm_serving.py", python, model(python, "smollm2"), "--requests", "200")
        subprocess.run([python, os.path.join(HERE, "export_check.py"), "cpu", "1"], check=True)
    print("all of it holds")
