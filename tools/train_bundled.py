"""Makes the bundled models: the tokenizer, the model, its draft, an adapter, and the card with what was measured.

    python tools/train_bundled.py --text FOLDER --out src/quire/bundled

FOLDER holds books as `*.txt`. Each stage can be run alone, and training resumes where its checkpoint left it.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from bundled import card, evaluation, exercises, manner, training, vocabulary
from bundled.adapter import train_adapter
from bundled.books import Book, plain_sentences, read_books, tale_openings
from bundled.rows import Batch, Rows
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

HELD_OUT_ROWS = 16
SHARE_OF_CHATS = 0.7
AGREEMENT_TEXTS = 40


@dataclass(frozen=True)
class Job:
    """What every stage needs: the books, what exercises take from them, and where things are written."""

    books: list[Book]
    material: exercises.Material
    out: Path
    work: Path
    minutes: float
    draft_minutes: float
    adapter_minutes: float
    note: str

    @property
    def model_folder(self) -> Path:
        return self.out / "model"

    @property
    def draft_folder(self) -> Path:
        return self.out / "draft"

    @property
    def adapter_folder(self) -> Path:
        return self.out / "lora-crier"

    def tokenizer(self) -> PreTrainedTokenizerFast:
        return AutoTokenizer.from_pretrained(self.model_folder)

    def checkpoint(self, name: str) -> Path:
        return self.work / f"{name}.pt"


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def make_tokenizer(job: Job) -> None:
    tokenizer = vocabulary.train_tokenizer(job.books, job.material)
    vocabulary.save_tokenizer(tokenizer, [job.model_folder, job.draft_folder])
    length = sum(len(tokenizer(book.held_out, verbose=False)["input_ids"]) for book in job.books)
    print(f"{len(tokenizer)} tokens, {sum(len(book.held_out) for book in job.books) / length:.2f} characters each")


def make_model(job: Job) -> None:
    plan = training.Plan(minutes=job.minutes)
    train(job, training.MODEL_SHAPE, plan, "model", job.model_folder)


def make_draft(job: Job) -> None:
    plan = training.Plan(minutes=job.draft_minutes, last_length=512)
    train(job, training.DRAFT_SHAPE, plan, "draft", job.draft_folder)


def train(job: Job, shape: training.Shape, plan: training.Plan, name: str, folder: Path) -> None:
    model = new_model(job, shape)
    rows = Rows(job.tokenizer(), job.books, job.material, seed=1, share_of_chats=SHARE_OF_CHATS)
    training.Trainer(model, rows, plan, job.checkpoint(name)).run(held_out_batch(job))
    export(model, folder)


def new_model(job: Job, shape: training.Shape) -> PreTrainedModel:
    tokenizer = job.tokenizer()
    return training.new_model(shape, tokenizer.eos_token_id, tokenizer.pad_token_id)


def held_out_batch(job: Job) -> Batch:
    """Pages of the books that training does not see, to watch it by."""
    ids = torch.tensor(job.tokenizer()("\n\n".join(book.held_out for book in job.books), verbose=False)["input_ids"])
    rows = ids[: HELD_OUT_ROWS * 513].view(HELD_OUT_ROWS, 513)
    return Batch(rows[:, :-1], rows[:, 1:], torch.ones(HELD_OUT_ROWS, 512))


def export(model: PreTrainedModel, folder: Path) -> None:
    """Writes the model as Transformers reads it, in bfloat16; without sampling it answers its exercises best."""
    model = model.to(torch.bfloat16)
    model.config.use_cache = True
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=model.config.eos_token_id, pad_token_id=model.config.pad_token_id
    )
    model.save_pretrained(folder)


def export_checkpoint(job: Job) -> None:
    """The model as it is while it is still being trained."""
    model = new_model(job, training.MODEL_SHAPE)
    model.load_state_dict(torch.load(job.checkpoint("model"), weights_only=True)["model"])
    export(model, job.model_folder)


def make_adapter(job: Job) -> None:
    rows = Rows(job.tokenizer(), job.books, job.material, seed=2, share_of_chats=1.0, conversation=manner.conversation)
    train_adapter(load(job.model_folder), rows, job.adapter_minutes, job.adapter_folder)


def evaluate(job: Job) -> None:
    """Measures all that was made, from the files, and writes the card."""
    tokenizer, model, draft = job.tokenizer(), load(job.model_folder), load(job.draft_folder)
    sizes = [
        card.size_row(job.model_folder, "the model", card.parameters_of(model)),
        card.size_row(job.draft_folder, "a draft of it, for speculative decoding", card.parameters_of(draft)),
    ]
    model_quality = evaluation.quality(model, tokenizer, job.books, job.material)
    draft_quality = evaluation.quality(draft, tokenizer, job.books, job.material)
    chats = evaluation.chat_prompts(tokenizer, job.material, AGREEMENT_TEXTS)
    prose = evaluation.prose_prompts(tokenizer, job.books, AGREEMENT_TEXTS)
    values = {
        "quality": card.quality_rows(model_quality, draft_quality),
        "examples": card.example_rows(evaluation.examples(job.material)),
        "per_kind": evaluation.EXERCISES_PER_KIND,
        "chat_agreement": evaluation.agreement(model, draft, chats),
        "prose_agreement": evaluation.agreement(model, draft, prose),
        "without_manner": evaluation.manner_shown(model, tokenizer, job.material),
        "used": training.used_for(job.checkpoint("model")),
        "draft_used": training.used_for(job.checkpoint("draft")),
        "config": model.config,
        "note": job.note,
    }
    adapted = PeftModel.from_pretrained(model, job.adapter_folder).eval()
    values["with_manner"] = evaluation.manner_shown(adapted, tokenizer, job.material)
    added = card.parameters_of(adapted, "lora_")
    sizes.append(card.size_row(job.adapter_folder, "an adapter that changes its manner", added))
    card.write_card(job.out, sizes, values)
    print((job.out / "README.md").read_text())


STAGES = {
    "tokenizer": make_tokenizer,
    "model": make_model,
    "draft": make_draft,
    "adapter": make_adapter,
    "evaluate": evaluate,
}
ASKED_FOR_ONLY = {"export": export_checkpoint}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="folder of books as *.txt")
    parser.add_argument("--out", type=Path, default=Path("src/quire/bundled"))
    parser.add_argument("--work", type=Path, default=Path("build/bundled"), help="folder for checkpoints")
    parser.add_argument("--stage", choices=[*STAGES, *ASKED_FOR_ONLY, "all"], default="all")
    parser.add_argument("--minutes", type=float, default=50, help="training time of the model")
    parser.add_argument("--draft-minutes", type=float, default=10)
    parser.add_argument("--adapter-minutes", type=float, default=4)
    parser.add_argument("--note", default="", help="what the card should say besides of how this run went")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.work.mkdir(parents=True, exist_ok=True)
    books = read_books(arguments.text)
    material = exercises.Material(plain_sentences(books), tale_openings(books))
    minutes = (arguments.minutes, arguments.draft_minutes, arguments.adapter_minutes)
    job = Job(books, material, arguments.out, arguments.work, *minutes, arguments.note)
    if arguments.stage in ASKED_FOR_ONLY:
        ASKED_FOR_ONLY[arguments.stage](job)
        return
    for name, stage in STAGES.items():
        if arguments.stage in (name, "all"):
            stage(job)


if __name__ == "__main__":
    main()
