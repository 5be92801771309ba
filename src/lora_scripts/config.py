"""Every setting of a run, declared once: type, default, bounds and explanation.

The YAML is flat; the groups below exist for readers of this file, of the settings page and of forms, which are all made
from the schema of `RunConfig`. Rules between settings (`run_rules.py`) are checked with them, before any weight is read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from lora_scripts.run_rules import run_faults
from lora_scripts.setting_values import Fraction, Names, Positive, Size, UserPath, entries_of, parse_size
from lora_scripts.words import Words, words_of

__all__ = ["RunConfig", "Size"]

OptimizerName = Literal["adamw", "adamw8bit", "adafactor", "lion", "prodigy", "adamw_schedulefree"]
SchedulerName = Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]
Precision = Literal["auto", "bf16", "fp16", "fp32"]
LossType = Literal["l2", "huber", "smooth_l1"]
HuberSchedule = Literal["constant", "exponential", "snr"]
DEFAULT_BATCH = 4


class Section(BaseModel):
    """Common behaviour: unknown keys are errors, docstrings are the explanations, NaN and infinity are refused."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False, protected_namespaces=()
    )


class BaseLoRA(Section):
    """A LoRA beneath the one that trains."""

    path: UserPath
    """A LoRA file, or a PEFT folder."""
    weight: Annotated[float, Field(ge=-10, le=10)] = 1.0
    """How strongly it is at work, as in `<lora:NAME:0.7>`."""

    @field_validator("weight")
    @classmethod
    def _does_something(cls, value: float) -> float:
        if value == 0:
            raise ValueError("0 would leave it without effect; take the entry out")
        return value


class PictureFolder(Section):
    """One of several folders of pictures, with settings of its own."""

    path: UserPath
    """Folder with the pictures, sub-folders included."""
    name: Annotated[str, Field(min_length=1)] | None = None
    """What the names of its pictures begin with. Default: the last part of `path`."""
    metadata_path: UserPath | None = None
    """Its captions; found as for `train_data_dir` without it."""
    repeats: Annotated[int, Field(ge=1, le=1000)] | None = None
    """Default: the run's `repeats`. With `regularization`: how often each is taken, compared with others of that kind; 1."""
    trigger_word: str | None = None
    """Default: the run's `trigger_word`; "" for none."""
    caption: str | None = None
    """The caption of those of its pictures that have none of their own."""
    weight: Annotated[float, Field(gt=0, le=100)] = 1.0
    """How much its pictures count in the loss."""
    mask_dir: UserPath | None = None
    """As the setting of that name, for this folder."""
    regularization: bool = False
    """Its pictures are not what is to be learnt; they keep what the model knows of other things of that kind. Mixed in so that an epoch has as many of them as of the others; never with a trigger word, never held out."""


class DataSettings(Section):
    """Pictures, captions and the shapes they are trained in."""

    train_data_dir: UserPath | None = None
    """Folder with the pictures, sub-folders included; for text-generation the folder with the dialogues, or one file of them. Required, unless `folders` names the pictures."""
    folders: Annotated[list[PictureFolder], BeforeValidator(entries_of)] = []
    """More folders of pictures, or all of them, each with settings of its own: paths, or `{path: ..., repeats: 3, trigger_word: ..., weight: 0.5}` (docs/data.md)."""
    metadata_path: UserPath | None = None
    """CSV (`filename,prompt`) or JSONL with the captions. Without it: `metadata.csv` or `metadata.jsonl` in the folder, else `.txt` files beside the pictures."""
    exclude: Names = []
    """Names of pictures to leave out, as listed by a run; `*` and `?` work."""
    resolution: Annotated[
        tuple[Annotated[int, Field(ge=64, le=4096)], Annotated[int, Field(ge=64, le=4096)]] | None,
        BeforeValidator(parse_size),
    ] = None
    """Training size: 512, "768x768" or [768, 768]. With buckets it sets the area. Default: what the model family was made for."""
    buckets: bool = True
    """Group pictures by shape instead of cropping all of them to one shape."""
    bucket_step: Annotated[int, Field(ge=8, le=256, multiple_of=8)] = 64
    """Bucket sides are multiples of this many pixels; small resolutions use a finer step by themselves."""
    max_aspect: Annotated[float, Field(ge=1, le=8)] = 2.0
    """The most elongated bucket, longer side over shorter; what goes beyond is cropped."""
    upscale: bool = True
    """Enlarge pictures that are smaller than their bucket (said in the log); false leaves them out."""
    repeats: Annotated[int, Field(ge=1, le=1000)] = 1
    """How often each picture is seen per epoch. A folder named `10_name` multiplies it by 10."""
    flip: bool = False
    """Also train on mirrored pictures (each is mirrored in half of its epochs). Not for text, logos or asymmetric faces."""
    trigger_word: str | None = None
    """Put in front of every caption that does not hold it yet; the word you will write in prompts. `folders` can have others."""
    caption_per_line: bool = False
    """Each line of a `.txt` or `.caption` file is a caption of its own, and every use of the picture draws one of them. Off: lines are joined. Tables have further captions in columns `prompt_2`, `prompt_3`, ... (docs/data.md)."""
    caption_separator: str = ","
    """What separates the parts of a caption that `caption_shuffle` moves."""
    caption_shuffle: bool = False
    """Shuffle the comma-separated parts of each caption anew in each epoch."""
    caption_keep: Annotated[int, Field(ge=0)] = 1
    """How many parts at the front stay in place when shuffling (the trigger word counts as one)."""
    caption_dropout: Fraction = 0.0
    """Share of examples trained with an empty caption, so that the look also shows without a prompt."""
    caption_variants: Annotated[int, Field(ge=1, le=64)] = 4
    """With `caption_shuffle`: how many different orders of each caption are encoded and cached."""
    cache_dir: UserPath | None = None
    """Where encoded pictures and captions are kept. Default: `.cache` in `train_data_dir`, or in the first of `folders`, shared by all runs on it; `output_dir/cache` when that cannot be written."""


class MaskSettings(Section):
    """Which parts of a picture are learnt."""

    masked_loss: Literal["none", "alpha", "folder"] = "none"
    """Where a mask says what of a picture is learnt: alpha, its own transparency; folder, a second picture, white where it is to be learnt (docs/data.md). Pictures without a mask are learnt whole."""
    mask_dir: UserPath | None = None
    """With `masked_loss: folder`: masks named like the pictures, in sub-folders like theirs. Default: beside the pictures, as `NAME-masklabel.png`."""
    masked_weight_outside: Fraction = 0.1
    """How much what the mask leaves out counts all the same; with 0 the model may put anything there."""
    masked_normalize: bool = False
    """Divide a picture's loss by its mask's mean, so that pictures count alike however small the mask. Off, as usual: a picture counts as much as its mask covers."""


class DialogueSettings(Section):
    """Dialogues and how they become tokens (text-generation)."""

    max_length: Annotated[int, Field(ge=8, le=1_000_000)] | None = None
    """Longest dialogue in tokens; what is beyond is cut off and counted. Default: 2048, or what the model was made for if that is less."""
    train_on: Literal["assistant", "all"] = "assistant"
    """Which tokens are learnt: the assistant's answers, or everything."""
    objective: Literal["sft", "dpo", "orpo"] = "sft"
    """What is learnt: sft, to write the answers of the data; dpo or orpo, to prefer one of two answers to the other (docs/preference.md)."""
    preference_beta: Positive = 0.1
    """dpo: how strongly the model is held to what it was, less is freer; orpo: how much the preference counts beside the answers themselves."""
    system_prompt: str | None = None
    """Put before every dialogue that has no system message; use the same words when you talk to the model."""
    packing: bool = True
    """Put the dialogues of a batch one behind the other instead of padding them to one length; each sees itself alone. Off: padded, and dialogues of like length go together."""
    validation_dialogues: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    """Dialogues held out of training to measure the validation loss. auto: up to 16 of `dev.jsonl`; without that file about 8 %, 2 to 16, none below 12."""
    sample_tokens: Annotated[int, Field(ge=1, le=8192)] = 160
    """Longest answer of a preview, in tokens."""


class ModelSettings(Section):
    """The frozen model that the LoRA is for."""

    base_model: Annotated[str, Field(min_length=1)]
    """A `.safetensors` file, a diffusers or transformers folder, a hub id, or a built-in name such as `builtin:mini-sd`."""
    model_family: Literal["auto", "sd15", "sd2", "sdxl", "causal_lm"] = "auto"
    """The architecture; found from the weights."""
    allow_download: bool = False
    """Fetch a hub id that is not on this machine yet. Off: nothing ever touches the network."""
    prediction: Literal["auto", "epsilon", "v_prediction"] = "auto"
    """What the model predicts; read from the model's own files where they say so."""
    zero_terminal_snr: bool | None = None
    """Rescale the noise schedule so that its last step is pure noise (needs a v-prediction model). Default: what the model says."""
    clip_skip: Annotated[int, Field(ge=1, le=12)] = 1
    """Which layer of the text encoder is read, counted from the end; 2 for many anime models of version 1. SDXL reads the last but one anyway: 1 and 2 are the same there (docs/sdxl.md)."""
    mixed_precision: Precision = "auto"
    """Number format of the frozen weights: bf16 where the device has it, else fp16 on a GPU, else fp32. Adapters train in fp32."""
    vae_precision: Precision = "auto"
    """Number format of the autoencoder, which encodes each picture once. auto: fp32. bf16 halves the memory of encoding large pictures; fp16 does too, and pictures on which it overflows are encoded again in fp32."""
    quantization: Literal["none", "nf4", "int8"] = "none"
    """How the frozen weights of a language model are kept: nf4 takes a quarter of bf16 (QLoRA), int8 half of it; both need bitsandbytes (docs/quantization.md)."""
    device: str = "auto"
    """auto, cuda, cuda:1, mps or cpu."""


class AdapterSettings(Section):
    """The trainable layers."""

    adapter: Literal["lora", "locon", "dora", "loha", "lokr", "oft"] = "lora"
    """Kind of adapter: lora; locon, which trains the U-Net's convolutions too; dora, which also trains the length of every weight row; loha, lokr and oft as in LyCORIS (docs/adapters.md)."""
    lora_rank: Annotated[int, Field(ge=1, le=1024)] = 8
    """Size of the adapter: 8 first, 16 when the result is weak."""
    lora_alpha: Positive | None = None
    """Scale is alpha / rank. Default: the rank, so a scale of 1."""
    use_rslora: bool = False
    """Scale is alpha / sqrt(rank) instead, so that ranks of 32 and more learn no slower (docs/adapters.md)."""
    lora_init: Literal["auto", "gaussian", "kaiming", "pissa"] = "auto"
    """How the matrices of each layer begin. gaussian, as in diffusers' scripts, learns several times faster at the same rate; kaiming is PEFT's and kohya's, for learning rates taken from there; pissa begins as the principal part of the weight (docs/adapters.md). auto: gaussian for pictures, kaiming for text."""
    lora_plus_ratio: Annotated[float, Field(ge=1, le=1000)] = 1.0
    """LoRA+: the second matrix of each layer learns at this many times the rate; 16 is its authors' advice, with a lower `learning_rate` (docs/adapters.md)."""
    conv_rank: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Rank of 3x3 convolutions; with dora, loha and lokr it makes them train too. Default: `lora_rank` with locon, else they stay frozen."""
    conv_alpha: Positive | None = None
    """`lora_alpha` of 3x3 convolutions. Default: what gives them the scale of the other layers."""
    lokr_factor: Annotated[int, Field(ge=2, le=1024)] | Literal["auto"] = "auto"
    """With lokr: size of the small factor of each weight; 4 to 16 are usual, larger means a smaller file. auto: both factors as near in size as can be, the smallest file."""
    oft_block_size: Annotated[int, Field(ge=2, le=256)] = 32
    """With oft: channels that rotate together, at most; each layer takes the largest divisor of its channels that other programs read too."""
    block_ranks: dict[str, Annotated[int, Field(ge=0, le=1024)]] = {}
    """Other ranks for blocks, `{unet.down: 4, unet.mid: 8, unet.up.1: 16, text_encoder: 4}`; 0 leaves a block out, the longest name that fits wins."""
    block_rates: dict[str, Positive] = {}
    """Other learning rates for blocks, `{unet.mid: 5e-5}`, named as in `block_ranks`."""
    preset: Literal["none", "style", "character", "concept"] = "none"
    """Ranks and rates of blocks for an aim: style holds back the blocks that decide what is in a picture, concept and character those that decide its look (docs/adapters.md). Your own `block_ranks` and `block_rates` win."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of adapter inputs zeroed at random while training."""
    target_modules: Names | None = None
    """Endings of the names of the layers that get an adapter. Default: the family's attention layers."""
    train_text_encoder: bool = False
    """Train the text encoder too (of SDXL both): stronger binding of a trigger word, more memory, easier to overtrain."""
    init_lora_weights: UserPath | None = None
    """Go on from an older LoRA, with a fresh optimizer: any file that `lora-scripts inspect` understands, or a PEFT folder (docs/going-on.md)."""
    base_loras: Annotated[list[BaseLoRA], BeforeValidator(entries_of)] = []
    """Train on top of other LoRAs, which stay as they are: paths, or `{path: ..., weight: 0.7}`. They are folded into the base model for the run; the finished file holds what was trained alone (docs/going-on.md)."""


class TrainSettings(Section):
    """Steps, optimizer and schedule."""

    batch_size: Annotated[int, Field(ge=1, le=1024)] | Literal["auto"] = DEFAULT_BATCH
    """Pictures per micro-batch; 1 or 2 when memory is short. auto: as many of a step's pictures at once as fit into memory (docs/memory.md)."""
    gradient_accumulation_steps: Annotated[int, Field(ge=1, le=1024)] = 1
    """Micro-batches per optimizer step."""
    effective_batch: Annotated[int, Field(ge=1, le=1024)] | None = None
    """With `batch_size: auto`: pictures per optimizer step, however they are cut. Default: 4 x `gradient_accumulation_steps`."""
    memory_limit_gb: Positive | None = None
    """Memory that the settings on auto may count on, in 10^9 bytes. Default: 92 % of what is free on the device."""
    epochs: Annotated[int, Field(ge=1, le=100_000)] | None = None
    """Passes over the data. Default: 10."""
    max_steps: Annotated[int, Field(ge=1, le=10_000_000)] | None = None
    """Optimizer steps in all; wins over `epochs`."""
    learning_rate: Positive = 2e-4
    """1e-4 to 3e-4 for most sets; prodigy wants 1.0."""
    text_encoder_learning_rate: Annotated[float, Field(ge=0)] | None = None
    """Default: `learning_rate`."""
    optimizer: OptimizerName = "adamw"
    """adamw8bit needs a CUDA GPU and bitsandbytes."""
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Pull of the adapter's weights towards zero."""
    lr_scheduler: SchedulerName = "cosine"
    """How the rate moves over the run."""
    lr_cycles: Annotated[int, Field(ge=1, le=1000)] = 1
    """Cycles of `cosine_with_restarts`."""
    warmup_steps: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    """Steps over which the rate climbs from zero; auto is 5 % of the run, at most 100."""
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Gradients longer than this are shortened to it; 0 turns it off."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Keeps a moving average of the trained weights, which is then what is measured, shown and written: calmer from step to step. 0.999 is usual, reached after a warm-up; 0 turns it off (docs/objectives.md)."""
    gradient_checkpointing: bool | Literal["auto"] = "auto"
    """Trade speed for memory. auto: only when a step does not fit into memory otherwise."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 42
    """All random draws follow from it."""
    num_workers: Annotated[int, Field(ge=0, le=64)] | Literal["auto"] = "auto"
    """Threads that decode pictures while they are encoded; results do not depend on it."""


class SpeedSettings(Section):
    """How steps are computed."""

    compile: bool | Literal["auto"] = False
    """Fuse the small operations of the model's blocks with torch.compile; the first step of every picture shape then takes seconds to minutes longer. auto: on a CUDA GPU, when the run is long enough to earn that back."""
    cuda_graphs: bool | Literal["auto"] = False
    """Start all kernels of a pass at once, instead of one by one from Python. auto: on a CUDA GPU wherever it is possible; true on a CPU runs the same code without the gain."""
    record_passes: bool = True
    """On a CPU: write down the operations of a pass once for every picture shape and repeat them without Python's modules and autograd; the numbers stay the same to the bit (docs/speed.md)."""
    shard_model: bool = False
    """On several processes: each holds a part of a language model's frozen weights and gathers a layer from the others while it computes, for models too large for one GPU (docs/several-gpus.md)."""
    low_bit_matmul: Literal["none", "fp8", "int8", "auto"] = "none"
    """Multiply with the large frozen weights in 8 bits while training: fp8 on Ada and Hopper, int8 elsewhere; needs torchao (docs/speed.md). auto: on a CUDA GPU, in the kind that it has. Rounds, so a run is not resumed with another one."""
    fuse_layers: bool = True
    """Compute layers that read the same input together (q, k and v of an attention), as far as the kind of adapter allows (docs/speed.md)."""
    block_swap: Annotated[int, Field(ge=0, le=1024)] | Literal["auto"] = 0
    """So many blocks of the frozen model stay in the computer's memory and are fetched while the ones before them compute; for models that do not fit otherwise. auto: as few as it takes to fit, after smaller passes and checkpointing where those are auto too (docs/memory.md)."""


class LossSettings(Section):
    """What the denoiser is asked to learn."""

    min_snr_gamma: Annotated[float, Field(ge=0)] = 5.0
    """Weigh noise levels by min-SNR, so that nearly clean pictures do not outweigh the rest: what is asked for in a prompt is kept better. 0 weighs all alike. The loss in the log is the weighed one, the validation loss is not."""
    debiased_estimation: bool = False
    """Weigh noise levels by debiased estimation in place of min-SNR: more weight for very noisy pictures, where composition is decided (docs/objectives.md)."""
    loss_type: LossType = "l2"
    """How an error counts. l2: squared; huber or smooth_l1: outliers count by their size alone, which bears with a few unfit pictures (docs/objectives.md)."""
    huber_c: Annotated[float, Field(gt=0, le=1)] = 0.1
    """With huber and smooth_l1: error from which on it is an outlier, at the highest noise level; smaller forgives more."""
    huber_schedule: HuberSchedule = "snr"
    """How that threshold moves with the noise level. constant: not at all; exponential or snr: from 1 for clean pictures down to `huber_c`, so that details are learnt as with l2."""
    noise_offset: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Adds a constant per channel to the noise (0.05 is usual) so that very dark and very bright pictures can be learnt."""
    pyramid_noise_iterations: Annotated[int, Field(ge=0, le=16)] = 0
    """Adds so many levels of ever coarser noise (6 to 10 are usual), for the same aim as `noise_offset` at all sizes of shapes; 0 turns it off."""
    pyramid_noise_discount: Annotated[float, Field(gt=0, le=1)] = 0.3
    """How much each coarser level counts beside the one before it; 0.1 to 0.4 for a LoRA."""
    input_perturbation: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Puts this much more noise on than is to be predicted (0.1 is its authors' advice), against errors that add up over the steps of rendering; 0 turns it off."""
    prior_preservation_weight: Annotated[float, Field(ge=0, le=100)] = 0.0
    """Holds what the model makes of `prior_prompt` to what the base model makes of it, so that a class does not turn into your subject; needs no further pictures. 1 is usual, 0 turns it off; a step takes 2.5 times as long (docs/objectives.md)."""
    prior_prompt: str | None = None
    """The class that stays as it was, without the trigger word: `a dog` where `a sks dog` is trained."""
    timestep_sampling: Literal["stratified", "uniform"] = "stratified"
    """How noise levels are drawn. stratified: those of a step are spread evenly over the range, which calms loss and gradient at no cost; uniform: each on its own."""
    min_timestep: Annotated[int, Field(ge=0, le=999)] = 0
    """Lowest noise level trained."""
    max_timestep: Annotated[int, Field(ge=0, le=999)] = 999
    """Highest noise level trained."""


class ValidationSettings(Section):
    """How the run judges itself."""

    validation_pictures: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    """Pictures held out of training to measure the validation loss; which ones follows from their content. auto: about 8 %, 2 to 16, none below 12 pictures."""
    validate_every: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    """Measure the validation loss every so many steps; 0 never. auto: at every save, or more seldom, so that it takes at most 3 % of the run."""
    keep: Literal["best", "last"] = "best"
    """Which saved step becomes the finished file. best: the last one, unless an earlier one is better beyond the noise by held-out loss and pictures together; last: always the last one. See docs/best-step.md."""
    clip_model: str = "auto"
    """The CLIP that compares pictures of saved steps with the training pictures and prompts, at most 5 % of the run's time: a folder in transformers' layout or a hub id on this machine. auto: one that is on this machine, else `builtin:mini-clip`; none: saved steps are chosen by held-out loss alone."""
    early_stopping: Annotated[int, Field(ge=0)] = 0
    """End the run after so many measurements in a row without an improvement of the validation loss beyond its noise; 0 never."""


class OutputSettings(Section):
    """What is written, and how often."""

    output_dir: UserPath
    """Folder of the run: checkpoints, logs, samples, report and the finished file. The same folder again resumes."""
    output_name: str | None = None
    """File name, and the name in `<lora:NAME:0.7>`. Default: the last part of `output_dir`."""
    save_steps: Annotated[int, Field(ge=1)] = 100
    """A checkpoint and a loadable LoRA every so many steps."""
    keep_checkpoints: Annotated[int, Field(ge=1)] | None = None
    """Keep only the newest so many `checkpoint-N` folders. Default: all."""
    log_steps: Annotated[int, Field(ge=1)] = 10
    """Write to TensorBoard and train.log every so many steps."""
    save_precision: Literal["fp16", "bf16", "fp32"] = "fp16"
    """Number format of the finished file."""
    export_as: Literal["auto", "plain", "own"] = "auto"
    """Form of the finished file. plain: a LoRA that every program reads, whatever the kind; own: the kind's tensors (LyCORIS's names, DoRA's `dora_scale`). auto: own for loha, lokr and oft, else plain (docs/adapters.md)."""
    metadata_level: Literal["full", "public"] = "full"
    """`public` leaves caption statistics and folder names out of the file's header."""
    description: str = ""
    """Goes into the WebUI's card of this LoRA."""


class PreviewSettings(Section):
    """Pictures rendered during the run."""

    sample_prompts: Annotated[list[str], BeforeValidator(lambda v: [v] if isinstance(v, str) else v)] = []
    """Prompts rendered, or answered, before, during and after training. Default: four captions of the data set; four questions, held-out ones first."""
    sample_every: Annotated[int, Field(ge=0)] | None = None
    """Render previews every so many steps; 0 turns them off. Default: `save_steps`."""
    sample_negative_prompt: str = ""
    """What previews should not show."""
    sample_steps: Annotated[int, Field(ge=1, le=200)] = 20
    """Denoising steps of a preview."""
    sample_guidance: Annotated[float, Field(ge=1, le=30)] = 7.0
    """Classifier-free guidance of a preview (CFG scale)."""
    sample_seed: Annotated[int, Field(ge=0)] = 42
    """Seed of the first preview; the next prompts count up from it."""


class RunConfig(
    PreviewSettings,
    OutputSettings,
    ValidationSettings,
    LossSettings,
    SpeedSettings,
    TrainSettings,
    AdapterSettings,
    ModelSettings,
    DialogueSettings,
    MaskSettings,
    DataSettings,
):
    """One training run. Nine keys are enough; see configs/ for commented examples."""

    task_type: Literal["text-to-image", "text-generation"] = "text-to-image"
    """What is trained: pictures, or with text-generation a language model; `image-to-text` is read as text-to-image."""

    @field_validator("task_type", mode="before")
    @classmethod
    def _task_alias(cls, value: Any, info: ValidationInfo) -> Any:
        return "text-to-image" if value == "image-to-text" else value

    @field_validator("resolution")
    @classmethod
    def _resolution_fits_latents(cls, value: Size | None) -> Size | None:
        if value is not None and any(side % 8 for side in value):
            near = tuple(max(64, round(side / 8) * 8) for side in value)
            raise ValueError(f"each side must be a multiple of 8; nearest: {near[0]}x{near[1]}")
        return value

    @model_validator(mode="after")
    def _settings_agree(self) -> Self:
        if faults := run_faults(self):
            raise ValueError("\n".join(faults))
        return self

    @property
    def name(self) -> str:
        """The finished file's name without its ending."""
        return self.output_name or self.output_dir.resolve().name

    @property
    def data_dir(self) -> Path:
        """`train_data_dir`, or where `folders` stand in its place the first of them."""
        return self.train_data_dir or self.folders[0].path

    @property
    def triggers(self) -> list[str]:
        """The trigger words of all that trains, each once."""
        own = [folder.trigger_word for folder in self.folders if not folder.regularization]
        inherited = self.trigger_word if self.train_data_dir is not None or None in own else None
        return list(dict.fromkeys(word for word in (inherited, *own) if word))

    @property
    def words(self) -> Words:
        """How messages call what is trained on."""
        return words_of(self.task_type, self.objective)

    @property
    def num_held_out(self) -> int | Literal["auto"]:
        """Examples to hold out, as the task's own setting has it."""
        return self.validation_dialogues if self.task_type == "text-generation" else self.validation_pictures

    @property
    def step_size(self) -> int:
        """Pictures per optimizer step: what the user asked for, whatever memory makes of it."""
        if self.batch_size != "auto":
            return self.batch_size * self.gradient_accumulation_steps
        return self.effective_batch or DEFAULT_BATCH * self.gradient_accumulation_steps

    @property
    def micro_batch(self) -> int:
        """Pictures per forward pass at most; all of a step while `batch_size` is auto and nothing was chosen yet."""
        return self.step_size if self.batch_size == "auto" else self.batch_size

    @property
    def alpha(self) -> float:
        return float(self.lora_rank) if self.lora_alpha is None else self.lora_alpha

    @property
    def snr_gamma(self) -> float:
        """Of min-SNR as it is in force; 0 where noise levels are weighed otherwise or all alike."""
        return 0.0 if self.debiased_estimation else self.min_snr_gamma

    @property
    def preview_every(self) -> int:
        return self.save_steps if self.sample_every is None else self.sample_every
