"""A real vLLM in this process, for the checks beside it: loads what it is told, with the weightfs plugin as users install it.

usage: vllm_engine.py      (vLLM's Python; a line of JSON on stdin is a command, the answer a line of JSON on stdout)
    {"load": MODEL_DIR, "options": {…}}   what `vllm.LLM` takes; the engine before it is shut down
    {"scale": FACTOR}                     multiplies every live parameter in place
    {"generate": [token ids], "tokens": N}
    {"shutdown": true}
One process for many models: importing vLLM takes longer than loading a small one.
"""
import gc
import json
import os
import sys

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The engine, the worker and this program in one process, so that its parameters can be reached.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
OPTIONS = dict(skip_tokenizer_init=True, enforce_eager=True, max_model_len=256, max_num_seqs=4, dtype="bfloat16",
               distributed_executor_backend="uni", seed=0)


class Engine:
    llm = None

    def load(self, model, options):
        from vllm import LLM

        self.shutdown()
        self.llm = LLM(model=model, **{**OPTIONS, **options})
        return {"loaded": model}

    def model(self):
        return self.llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.model

    def scale(self, factor):
        """Each storage once: some parameters are views of others."""
        import torch

        storages = {}
        for parameter in self.model().parameters():
            storages.setdefault(parameter.untyped_storage().data_ptr(), parameter)
        with torch.no_grad():
            for parameter in storages.values():
                torch.empty(0, dtype=parameter.dtype).set_(parameter.untyped_storage()).mul_(factor)
        return {"storages": len(storages)}

    def generate(self, ids, tokens):
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        answer = self.llm.generate([{"prompt_token_ids": ids}], sampling, use_tqdm=False)[0]
        return {"ids": list(answer.outputs[0].token_ids), "cached": answer.num_cached_tokens}

    def shutdown(self):
        if self.llm is not None:
            from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

            self.llm.llm_engine.engine_core.shutdown()
            self.llm = None
            cleanup_dist_env_and_memory()
            gc.collect()


def main():
    # vLLM writes to stdout: answers get a descriptor of their own.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    engine = Engine()
    for line in sys.stdin:
        command = json.loads(line)
        try:
            if "load" in command:
                answer = engine.load(command["load"], command.get("options", {}))
            elif "scale" in command:
                answer = engine.scale(command["scale"])
            elif "generate" in command:
                answer = engine.generate(command["generate"], command["tokens"])
            else:
                break
        except Exception as e:  # noqa: BLE001: the check beside it decides
            answer = {"error": f"{type(e).__name__}: {e}"}
        print(json.dumps(answer), file=answers, flush=True)
    engine.shutdown()


if __name__ == "__main__":
    main()
