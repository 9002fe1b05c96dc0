"""
Trains a model that draws digits from text, and checks with a classifier whether it draws what the prompt says.

    python benchmarks/text_digits.py runs/text_digits

Needs no network: captions such as "a handwritten seven" are made here, and so is a tiny text encoder, whose weights are random and
stay so. Only the transformer learns what the words mean. Draws 500 images from prompts, and writes `samples.png` (one row per digit)
and `metrics.json` (`prompt_agreement`: the share whose digit the classifier confirms) into the folder.
"""

import argparse
import json
from pathlib import Path

import torch
from check_digits import ROWS_SHOW, draw, train_classifier
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from dae_diffusers import DAEDiTPipeline
from dae_diffusers.comparison.scripts import launch_script
from dae_diffusers.data import DataConfig, load_images
from dae_diffusers.evaluation_record import weights_by_part
from dae_diffusers.plots import image_grid
from dae_diffusers.store import write_json

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CAPTIONS = ("a handwritten {}", "the digit {}", "{}", "somebody wrote the number {} by hand")  # several for each image
PROMPTS = ("a handwritten {}", "the number {} by hand")  # the second is in no caption
PER_PROMPT = 25
MARKS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


def save_captioned_digits(folder: Path) -> None:
    """Saves the digits as a folder of pictures, with a list of captions for each in `metadata.jsonl`."""
    for split, images in zip(
        ("train", "test"), load_images(DataConfig(dataset_name="digits", image_channels=1)), strict=True
    ):
        (folder / split).mkdir(parents=True, exist_ok=True)
        rows = []
        for number, (row, label) in enumerate(zip(images.rows, images.labels, strict=True)):
            name = f"{number:04d}.png"
            (folder / split / name).write_bytes(row["image"]["bytes"])
            rows.append({"file_name": name, "text": [each.format(NUMBERS[label]) for each in CAPTIONS]})
        (folder / split / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def save_text_encoder(folder: Path, texts: list[str]) -> None:
    """Saves a tiny BERT with random weights, and a tokenizer that knows the words of the texts."""
    words = sorted({word for text in texts for word, _ in pre_tokenizers.Whitespace().pre_tokenize_str(text.lower())})
    vocabulary = {word: number for number, word in enumerate([*MARKS, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(mark, vocabulary[mark]) for mark in ("[CLS]", "[SEP]")]
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token"), MARKS, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=16, **names).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128,
        max_position_embeddings=16,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)


def draw_prompts(pipeline: DAEDiTPipeline, prompts: list[str], arguments: argparse.Namespace) -> torch.Tensor:
    """An image of each prompt, in [-1, 1]."""
    options = {"guidance_scale": arguments.guidance_scale, "num_inference_steps": arguments.num_inference_steps}
    return torch.cat(draw(pipeline, prompts, arguments.seed, output_type="pt", **options)) * 2 - 1


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where everything goes; an autoencoder in its `vae/` is used")
    parser.add_argument("--guidance_scale", type=float, default=2.0)
    parser.add_argument("--num_inference_steps", type=int, default=25)
    parser.add_argument("--max_train_steps", type=int, default=800)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    folder = arguments.folder

    save_captioned_digits(folder / "images")
    save_text_encoder(folder / "text_encoder", [each.format(number) for each in CAPTIONS for number in NUMBERS])
    common = {"output_dir": folder, "seed": arguments.seed, "resume_from_checkpoint": "latest"}
    if not (folder / "vae").exists():
        launch_script("train_dae", {"config": "digits_dae", **common})
    launch_script(
        "train_dit",
        {
            "config": "digits_dit",
            "train_data_dir": folder / "images",
            "label_column": "none",
            "caption_column": "text",
            "text_encoder": folder / "text_encoder",
            "vae": folder / "vae",
            "max_train_steps": arguments.max_train_steps,
            **common,
        },
    )
    classifier, accuracy = train_classifier(*load_images(DataConfig(dataset_name="digits", image_channels=1)))
    labels = torch.arange(10).repeat_interleave(PER_PROMPT).repeat(len(PROMPTS))
    prompts = [each.format(NUMBERS[n]) for each in PROMPTS for n in range(10) for _ in range(PER_PROMPT)]
    pipeline = DAEDiTPipeline.from_pretrained(folder / "pipeline")
    images = draw_prompts(pipeline, prompts, arguments)
    with torch.no_grad():
        agreement = (classifier(images).argmax(dim=1) == labels).float()
    show = torch.cat([images[labels == label][:ROWS_SHOW] for label in range(10)])
    image_grid(show, columns=ROWS_SHOW, row_names=[PROMPTS[0].format(n) for n in NUMBERS]).save(folder / "samples.png")
    metrics = {
        "prompt_agreement": agreement.mean().item(),
        "by_prompt": dict(zip(PROMPTS, agreement.view(len(PROMPTS), -1).mean(1).tolist(), strict=True)),
        "num_images": len(labels),
        "classifier_accuracy_on_real_test_digits": accuracy,
        **{name: getattr(arguments, name) for name in ("guidance_scale", "num_inference_steps", "seed")},
        "weights": weights_by_part(pipeline.components),
    }
    write_json(folder / "metrics.json", metrics)
    print(json.dumps(metrics, indent=2))


if __name__ == "__main__":
    main()
