"""BERT encoders, and what Hugging Face's transformers answers for them.

    encoder_models.py write FOLDER          writes small models with random weights and their cases, from fixed seeds
    encoder_models.py answer MODEL FILE     writes the cases of a model that is there: the folder of all-MiniLM-L6-v2

It needs PyPI's transformers 5.23.0, tokenizers 0.23.3, safetensors 0.8.0 and torch 2.15.0. The answers are computed in
double precision, from the weights as the files have them.
"""

import json
import pathlib
import string
import sys

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoModel, BertConfig, BertForSequenceClassification, BertModel

WORDS = "the cat dog sat on mat a river runs fast slow good bad very not is it was and cafe strasse sing ##ing ##s ##er"
OTHERS = list("中文字ßøπ€") + list(".,!?-'\"()") + list(string.digits) + ["##" + digit for digit in string.digits]

TEXTS = [
    "the cat sat on the mat",
    "",
    "Café, STRASSE! naïve…",
    "it was not very good and the dog runs slower",
    "中文 the 字cat",
    "a",
    "unknown words: xylophone-7 € 42 \u0000\u200b\ttab",
    "the river runs fast " * 4,
    "sings singing singer sing s",
]


SENTENCES = [
    "How do I reset my password?",
    "I forgot the word that lets me sign in.",
    "The cat sits on the mat.",
    "A train leaves Zürich at 7:42 and arrives in Genève at 10:15, if the Wi-Fi on board is to be believed.",
    "Die Sonne scheint über den Bergen.",
    "東京の天気は晴れです。",
    "",
    "fn main() { println!(\"{:?}\", std::env::args().collect::<Vec<_>>()); }",
    "Actors are placed, watched and started again by a control plane that keeps its state in Raft. " * 12,
]


def vocabulary():
    letters = list(string.ascii_lowercase)
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *("##" + one for one in letters), *OTHERS]
    pieces += [word for word in WORDS.split() if word not in pieces]
    return {piece: index for index, piece in enumerate(pieces)}


def tokenizer(vocab, truncation):
    made = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=100))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocab["[CLS]"]), ("[SEP]", vocab["[SEP]"])],
    )
    made.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    if truncation:
        made.enable_truncation(truncation)
    # As sentence-transformers writes it: a server has to pad as it sees fit.
    made.enable_padding(length=truncation)
    return made


def randomize(model, seed):
    """Weights that matter: those of a new model are so small that a mistake in the attention would not be seen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * drawn if name.endswith("LayerNorm.weight") else 0.3 * drawn)


def config(vocab, **more):
    return BertConfig(
        vocab_size=len(vocab),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=40,
        **more,
    )


def cases(model, tokens_of, core, texts=TEXTS):
    found = []
    for text in texts:
        encoded = tokens_of(text)
        ids = [token for token, real in zip(encoded.ids, encoded.attention_mask) if real]
        with torch.no_grad():
            hidden = core(torch.tensor([ids])).last_hidden_state
            case = {"text": text, "tokens": ids, "embedding": hidden[0].mean(0).tolist()}
            if model is not core:
                case["logits"] = model(torch.tensor([ids])).logits[0].tolist()
        found.append(case)
    return found


def write(folder, name, model, core, vocab, truncation, rename, dtype):
    folder = folder / name
    folder.mkdir(parents=True, exist_ok=True)
    made = tokenizer(vocab, truncation)
    made.save(str(folder / "tokenizer.json"), pretty=False)
    model.to(dtype).eval()
    # Sizes that are tied or derived are not written.
    tensors = {rename(key): value.contiguous() for key, value in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    described = model.config.to_dict()
    described["architectures"] = [type(model).__name__]
    (folder / "config.json").write_text(json.dumps(described, indent=1, sort_keys=True) + "\n")
    model.double()
    answers = cases(model, made.encode, core)
    (folder / "cases.json").write_text(json.dumps(answers, indent=1, ensure_ascii=True) + "\n")


def answer(folder, file):
    core = AutoModel.from_pretrained(folder).double().eval()
    tokens_of = Tokenizer.from_file(str(folder / "tokenizer.json")).encode
    found = cases(core, tokens_of, core, SENTENCES)
    for case in found:
        case["embedding"] = [round(value, 8) for value in case["embedding"]]
    lines = (json.dumps(case, ensure_ascii=True) for case in found)
    file.write_text("[\n" + ",\n".join(lines) + "\n]\n")


def main():
    if len(sys.argv) == 4 and sys.argv[1] == "answer":
        return answer(pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[3]))
    if len(sys.argv) != 3 or sys.argv[1] != "write":
        sys.exit(__doc__)
    folder = pathlib.Path(sys.argv[2])
    vocab = vocabulary()
    embedder = BertModel(config(vocab), add_pooling_layer=False)
    randomize(embedder, 7)
    write(folder, "embedder", embedder, embedder, vocab, None, lambda key: key, torch.float32)

    rectified = BertModel(config(vocab, hidden_act="relu"), add_pooling_layer=False)
    randomize(rectified, 13)
    write(folder, "rectified", rectified, rectified, vocab, None, lambda key: key, torch.bfloat16)

    labels = {0: "bad", 1: "good", 2: "neither"}
    classifier = BertForSequenceClassification(
        config(vocab, hidden_act="gelu_new", id2label=labels, label2id={v: k for k, v in labels.items()})
    )
    randomize(classifier, 11)

    def older(key):
        """The names of files that were converted from TensorFlow."""
        return key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")

    write(folder, "classifier", classifier, classifier.bert, vocab, 16, older, torch.float16)


if __name__ == "__main__":
    main()
