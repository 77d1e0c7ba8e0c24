"""Configuration of a Llama-3.2-Vision model: the contents of a published config.json, checked.

Field names are those of the Hugging Face config.json. Fields of that file that change no number (such as ``use_cache``
and ``length_penalty``) are not kept. Settings that this implementation does not have (another activation, tied
embeddings, dropout) are refused by name rather than ignored.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self, get_args

from llava_cot_jax.checks import check_instance, check_int, check_number, shown
from llava_cot_jax.errors import UserError
from llava_cot_jax.files import read_json
from llava_cot_jax.model.checkpoint.generation_settings import check_token_ids, end_token_ids
from llava_cot_jax.model.convention import Convention, find_convention
from llava_cot_jax.paths import checkpoint_path, reading_errors

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
PUBLISHED_ASPECT_RATIOS = ((1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1))


def _check_types(config: Any, kind: str) -> None:
    """Check that each field of a configuration is a number, or a tuple of them, as its annotation says."""
    for each in fields(config):
        name, value = f"{kind} {each.name}", getattr(config, each.name)
        if each.type in (int, float):
            _check_number(name, value, each.type is int)
        elif each.type == RopeScaling | None:
            if value is not None:
                check_instance(name, value, RopeScaling, "give a RopeScaling, or None")
        else:
            if not isinstance(value, tuple):
                raise UserError(f"{name} is {shown(value)}; it must be a tuple")
            of_pairs = each.type == tuple[tuple[int, int], ...]
            for entry in value:
                if of_pairs and not (isinstance(entry, tuple) and len(entry) == 2):
                    raise UserError(f"{name} has {shown(entry)}; each must be a height and a width in tiles")
                for number in entry if of_pairs else (entry,):
                    _check_number(name, number, whole="int" in str(each.type))


def _check_number(name: str, value: Any, whole: bool) -> None:
    if whole:
        check_int(name, value, least=None)
    else:
        check_number(name, value)


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's stretching of the RoPE wavelengths beyond the context of its first training.

    Attributes:
        factor: Factor by which the longest wavelengths are stretched.
        low_freq_factor: Wavelengths above ``original_max_position_embeddings`` over this are stretched fully.
        high_freq_factor: Wavelengths below ``original_max_position_embeddings`` over this are kept.
        original_max_position_embeddings: Context of the first training, in tokens.
    """

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def __post_init__(self) -> None:
        _check_types(self, "rope")
        if self.high_freq_factor <= self.low_freq_factor:
            raise UserError(
                f"rope high_freq_factor ({self.high_freq_factor}) must exceed low_freq_factor ({self.low_freq_factor})"
            )


@dataclass(frozen=True)
class VisionConfig:
    """Configuration of the vision tower. The defaults are those of both published Instruct models.

    Attributes:
        hidden_size: Width of the tower.
        intermediate_size: Width of its MLPs.
        attention_heads: Number of heads of every layer.
        num_hidden_layers: Number of local layers.
        num_global_layers: Number of gated layers after them.
        num_channels: Number of colour channels.
        image_size: Side of a tile, in pixels.
        patch_size: Side of a patch, in pixels.
        max_num_tiles: Largest number of tiles of an image; the arrays of every image have room for all of them.
        intermediate_layers_indices: Indices of the local layers that are tapped for features.
        supported_aspect_ratios: Canvases (tiles high, tiles wide); an aspect ratio id is an index + 1.
        norm_eps: Epsilon of the layers' LayerNorms.
        initializer_range: Standard deviation of initial values.
        image_mean: Mean of each channel, of values from 0 to 1, for uint8 tiles.
        image_std: Standard deviation of each channel, of values from 0 to 1, for uint8 tiles.
    """

    hidden_size: int = 1280
    intermediate_size: int = 5120
    attention_heads: int = 16
    num_hidden_layers: int = 32
    num_global_layers: int = 8
    num_channels: int = 3
    image_size: int = 560
    patch_size: int = 14
    max_num_tiles: int = 4
    intermediate_layers_indices: tuple[int, ...] = (3, 7, 15, 23, 30)
    supported_aspect_ratios: tuple[tuple[int, int], ...] = PUBLISHED_ASPECT_RATIOS
    norm_eps: float = 1e-5
    initializer_range: float = 0.02
    image_mean: tuple[float, ...] = CLIP_MEAN
    image_std: tuple[float, ...] = CLIP_STD

    def __post_init__(self) -> None:
        _check_types(self, "vision")
        positive = ("hidden_size", "intermediate_size", "attention_heads", "num_hidden_layers", "num_channels")
        _require_positive(self, "vision", *positive, "image_size", "patch_size", "max_num_tiles")
        if self.num_global_layers < 0:
            raise UserError(f"vision num_global_layers must not be negative, got {self.num_global_layers}")
        _require_multiple("vision hidden_size", self.hidden_size, "attention_heads", self.attention_heads)
        _require_multiple("vision image_size", self.image_size, "patch_size", self.patch_size)
        for tap in self.intermediate_layers_indices:
            if not 0 <= tap < self.num_hidden_layers:
                raise UserError(
                    f"vision intermediate_layers_indices: tap {tap} is out of range for "
                    f"{self.num_hidden_layers} layers (0 to {self.num_hidden_layers - 1})"
                )
        if not self.supported_aspect_ratios:
            raise UserError("vision supported_aspect_ratios is empty")
        for height, width in self.supported_aspect_ratios:
            if min(height, width) < 1 or height * width > self.max_num_tiles:
                raise UserError(
                    f"vision supported_aspect_ratios: {height} x {width} tiles do not fit max_num_tiles = "
                    f"{self.max_num_tiles}"
                )
        for name in ("image_mean", "image_std"):
            if len(getattr(self, name)) != self.num_channels:
                raise UserError(f"vision {name} has {len(getattr(self, name))} values for {self.num_channels} channels")
        if min(self.image_std) <= 0:
            raise UserError(f"vision image_std must be positive, got {self.image_std}")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.attention_heads

    @property
    def patches(self) -> int:
        """Number of patches of a tile."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def tile_tokens(self) -> int:
        """Number of tokens of a tile: its patches and the class token."""
        return self.patches + 1

    @property
    def image_tokens(self) -> int:
        """Number of tokens of an image in cross-attention, those of unused tiles counted."""
        return self.max_num_tiles * self.tile_tokens

    @property
    def output_size(self) -> int:
        """Number of features of a vision token: the last layer's and every tap's (``vision_output_dim``)."""
        return self.hidden_size * (1 + len(self.intermediate_layers_indices))


@dataclass(frozen=True)
class TextConfig:
    """Configuration of the language model. The defaults are those of the 11B.

    Attributes:
        vocab_size: Number of rows of lm_head; the embedding has ``EXTRA_EMBEDDINGS`` more.
        hidden_size: Width of the residual stream.
        intermediate_size: Width of the MLPs.
        num_hidden_layers: Number of self-attention and cross-attention layers together.
        num_attention_heads: Number of query heads.
        num_key_value_heads: Number of key and value heads; each serves a group of query heads.
        cross_attention_layers: Indices of the layers that attend to the images, ascending.
        rms_norm_eps: Epsilon of every RMSNorm.
        rope_theta: Base of the RoPE wavelengths.
        rope_scaling: Llama 3's stretching of the RoPE wavelengths, or None.
        max_position_embeddings: Longest context, in tokens.
        initializer_range: Standard deviation of initial values.
        bos_token_id: Token that a text begins with.
        eos_token_ids: Tokens that end an answer.
        pad_token_id: Token for padding.
    """

    vocab_size: int = 128256
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_hidden_layers: int = 40
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    cross_attention_layers: tuple[int, ...] = (3, 8, 13, 18, 23, 28, 33, 38)
    rms_norm_eps: float = 1e-5
    rope_theta: float = 500000.0
    rope_scaling: RopeScaling | None = RopeScaling()
    max_position_embeddings: int = 131072
    initializer_range: float = 0.02
    bos_token_id: int = 128000
    eos_token_ids: tuple[int, ...] = (128001, 128008, 128009)
    pad_token_id: int = 128004

    def __post_init__(self) -> None:
        _check_types(self, "text")
        positive = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        _require_positive(self, "text", *positive, "num_key_value_heads", "max_position_embeddings")
        _require_multiple("text hidden_size", self.hidden_size, "num_attention_heads", self.num_attention_heads)
        _require_multiple(
            "text num_attention_heads", self.num_attention_heads, "num_key_value_heads", self.num_key_value_heads
        )
        if self.head_dim % 2:
            raise UserError(f"text head_dim must be even for RoPE, got {self.head_dim}")
        if list(self.cross_attention_layers) != sorted(set(self.cross_attention_layers)):
            raise UserError(f"text cross_attention_layers must ascend, got {list(self.cross_attention_layers)}")
        for layer in self.cross_attention_layers:
            if not 0 <= layer < self.num_hidden_layers:
                raise UserError(
                    f"text cross_attention_layers: {layer} is out of range for {self.num_hidden_layers} layers"
                )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def is_cross(self) -> tuple[bool, ...]:
        """Whether each layer is a cross-attention layer."""
        return tuple(i in self.cross_attention_layers for i in range(self.num_hidden_layers))

    @property
    def layers_per_block(self) -> int:
        """Number of layers of the smallest block whose repetition gives all layers.

        It is 5 in the published models, and the number of all layers where the pattern of cross-attention layers does
        not repeat.
        """
        kinds, n = self.is_cross, self.num_hidden_layers
        return next(p for p in range(1, n + 1) if n % p == 0 and kinds == kinds[:p] * (n // p))


EXTRA_EMBEDDINGS = 8
"""Number of rows that the embedding table has beyond the vocabulary; the first is that of ``<|image|>``."""


@dataclass(frozen=True)
class MllamaConfig:
    """Configuration of a Llama-3.2-Vision model.

    Attributes:
        vision: Configuration of the vision tower.
        text: Configuration of the language model.
        image_token_index: Token that stands for an image in a prompt.
        convention: Implementation that the parameters were trained with.

    Raises:
        UserError: A field contradicts another, or is out of range.
    """

    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    image_token_index: int = 128256
    convention: Convention = "meta"

    def __post_init__(self) -> None:
        check_instance("vision", self.vision, VisionConfig, "give a VisionConfig")
        check_instance("text", self.text, TextConfig, "give a TextConfig")
        check_int("image_token_index", self.image_token_index, least=None)
        if not isinstance(self.convention, str) or self.convention not in get_args(Convention):
            raise UserError(f"unknown convention {shown(self.convention)}; one of {', '.join(get_args(Convention))}")
        embeddings = self.text.vocab_size + EXTRA_EMBEDDINGS
        if not 0 <= self.image_token_index < embeddings:
            raise UserError(f"image_token_index {self.image_token_index} is beyond the {embeddings} embeddings")

    @classmethod
    def llama32_11b(cls) -> Self:
        """Return the configuration of Llama-3.2-11B-Vision-Instruct (10,670,220,835 parameters)."""
        return cls()

    @classmethod
    def llama32_90b(cls) -> Self:
        """Return the configuration of Llama-3.2-90B-Vision-Instruct (88,593,355,323 parameters)."""
        text = TextConfig(
            hidden_size=8192,
            intermediate_size=28672,
            num_hidden_layers=100,
            num_attention_heads=64,
            cross_attention_layers=tuple(range(3, 100, 5)),
        )
        return cls(text=text)

    @property
    def vision_taps(self) -> tuple[int, ...]:
        """Indices of the states between local layers that are features: i is the input of layer i."""
        offset = 1 if self.convention == "transformers_5" else 0
        return tuple(tap + offset for tap in self.vision.intermediate_layers_indices)

    def for_transformers(self) -> Self:
        """Return this configuration with the taps that give the same features in transformers 4.56 and later.

        There a tap is the layer's output, so each index is lowered by one, and the convention is ``transformers_5``.
        From ``meta``, text tokens that see no image still differ.

        Raises:
            UserError: Layer 0 is tapped at its input, which transformers cannot express.
        """
        if self.convention == "transformers_5":
            return self
        taps = tuple(tap - 1 for tap in self.vision.intermediate_layers_indices)
        if taps and min(taps) < 0:
            raise UserError("a tap at the input of vision block 0 cannot be expressed in transformers 4.56 and later")
        vision = replace(self.vision, intermediate_layers_indices=taps)
        return replace(self, vision=vision, convention="transformers_5")

    @classmethod
    def from_dict(cls, published: Mapping[str, Any]) -> Self:
        """Read the object in a Hugging Face config.json, of transformers 4 or 5.

        The convention is the one that it states, or ``"meta"``.

        Raises:
            UserError: It is another model's, or a key is missing, or this implementation lacks a setting.
        """
        check_instance("published", published, Mapping, "give the object in a config.json")
        if published.get("model_type") != "mllama":
            raise UserError(f"config.json is of a {published.get('model_type')!r} model, not of 'mllama'")
        return cls(
            vision=_read_vision(_section(published, "vision_config")),
            text=_read_text(_section(published, "text_config")),
            image_token_index=published.get("image_token_index", published.get("image_token_id", 128256)),
            convention=published.get("convention", "meta"),
        )

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Read the configuration of a checkpoint.

        It is that of config.json, with the convention that ``convention.find_convention`` finds, the pixel statistics
        that the processor's files state, and the end tokens that generation_config.json and the tokenizer name besides
        its own.

        Args:
            folder: Folder of a checkpoint, or ``"shapes"``, the checkpoint that the package contains.

        Raises:
            UserError: There is no config.json, or a file is no JSON, or ``from_dict`` refuses it.
        """
        folder = checkpoint_path(folder)
        published = read_json(folder / "config.json")
        config = cls.from_dict({**published, "convention": find_convention(published)[0]})
        _, stated = image_settings(folder)
        pixels: dict[str, Any] = {k: tuple(stated[k]) for k in ("image_mean", "image_std") if k in stated}
        ends = tuple(dict.fromkeys((*config.text.eos_token_ids, *end_token_ids(folder))))
        if not any(token < config.text.vocab_size for token in ends):
            raise UserError(
                f"{folder} names no end token within its vocabulary of {config.text.vocab_size} ({list(ends)}), so "
                "that no answer would end: correct eos_token_id in generation_config.json"
            )
        text = replace(config.text, eos_token_ids=ends)
        return replace(config, vision=replace(config.vision, **pixels), text=text)

    def to_dict(self, dtype: str) -> dict[str, Any]:
        """Return the object of a config.json in the published form, which transformers 4.45 and later read.

        Args:
            dtype: Name of the parameters' dtype, e.g. ``"bfloat16"``.
        """
        vision, text = self.vision, self.text
        return {
            "architectures": ["MllamaForConditionalGeneration"],
            "model_type": "mllama",
            "torch_dtype": dtype,
            "convention": self.convention,
            "image_token_index": self.image_token_index,
            "vision_config": {
                "model_type": "mllama_vision_model",
                "hidden_act": "gelu",
                **{name: _to_lists(getattr(vision, name)) for name in _VISION_FIELDS},
                "vision_output_dim": vision.output_size,
            },
            "text_config": {
                "model_type": "mllama_text_model",
                "hidden_act": "silu",
                "tie_word_embeddings": False,
                **{name: _to_lists(getattr(text, name)) for name in _TEXT_FIELDS},
                "eos_token_id": text.eos_token_ids[0] if len(text.eos_token_ids) == 1 else list(text.eos_token_ids),
                "rope_theta": text.rope_theta,
                "rope_scaling": {"rope_type": "llama3", **vars(text.rope_scaling)} if text.rope_scaling else None,
            },
        }


_VISION_FIELDS = tuple(VisionConfig.__dataclass_fields__)
_FIELDS_WRITTEN_DIFFERENTLY = ("rope_theta", "rope_scaling", "eos_token_ids")
_TEXT_FIELDS = tuple(name for name in TextConfig.__dataclass_fields__ if name not in _FIELDS_WRITTEN_DIFFERENTLY)


def _read_vision(section: Mapping[str, Any]) -> VisionConfig:
    _require_setting(section, "vision_config", "hidden_act", "gelu")
    fields = {name: _to_tuples(section[name]) for name in _VISION_FIELDS if section.get(name) is not None}
    config = VisionConfig(**fields)
    if section.get("vision_output_dim", config.output_size) != config.output_size:
        raise UserError(
            f"vision_config: vision_output_dim is {section['vision_output_dim']}, but hidden_size and "
            f"{len(config.intermediate_layers_indices)} taps make {config.output_size}"
        )
    return config


def _read_text(section: Mapping[str, Any]) -> TextConfig:
    _require_setting(section, "text_config", "hidden_act", "silu")
    _require_setting(section, "text_config", "tie_word_embeddings", False)
    _require_setting(section, "text_config", "dropout", 0)
    fields = {name: _to_tuples(section[name]) for name in _TEXT_FIELDS if section.get(name) is not None}
    if (eos := section.get("eos_token_id")) is not None:
        fields["eos_token_ids"] = check_token_ids(eos, "text_config: eos_token_id")
    # transformers 4 writes rope_theta beside rope_scaling, transformers 5 both into rope_parameters.
    rope = section.get("rope_parameters") or section.get("rope_scaling") or {}
    check_instance("text_config: rope_scaling", rope, Mapping, "it must be an object, or null")
    theta = rope.get("rope_theta", section.get("rope_theta"))
    return TextConfig(**fields, **({} if theta is None else {"rope_theta": theta}), rope_scaling=_read_rope(rope))


def _read_rope(rope: Mapping[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise UserError(f"text_config: rope type {kind!r} is not supported; 'llama3' or 'default' is")
    try:
        return RopeScaling(**{name: rope[name] for name in RopeScaling.__dataclass_fields__})
    except KeyError as missing:
        raise UserError(f"text_config: the rope settings lack {missing}") from None


def _section(published: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    if not isinstance(published.get(name), Mapping):
        raise UserError(f"config.json has no {name}")
    return published[name]


def _require_setting(section: Mapping[str, Any], where: str, name: str, only: object) -> None:
    if section.get(name, only) != only:
        raise UserError(f"{where}: {name} = {section[name]!r} is not supported; only {only!r} is")


def _require_positive(config: object, kind: str, *names: str) -> None:
    for name in names:
        if getattr(config, name) < 1:
            raise UserError(f"{kind} {name} must be positive, got {getattr(config, name)}")


def _require_multiple(name: str, value: int, divisor_name: str, divisor: int) -> None:
    if value % divisor:
        raise UserError(f"{name} ({value}) is not divisible by {divisor_name} ({divisor})")


def image_settings(folder: Path) -> tuple[Path, dict[str, Any]]:
    """Return the file in which a checkpoint states how its images are processed, and its settings.

    The settings are empty where the checkpoint has no such file.

    Raises:
        UserError: The file is not a JSON object.
    """
    path = folder / "preprocessor_config.json"
    with reading_errors(folder):
        if path.exists():
            return path, read_json(path)
        path = folder / "processor_config.json"  # where transformers 5 writes them
        return path, read_json(path).get("image_processor", {}) if path.exists() else {}


def _to_tuples(value: Any) -> Any:
    return tuple(_to_tuples(v) for v in value) if isinstance(value, list) else value


def _to_lists(value: Any) -> Any:
    return [_to_lists(v) for v in value] if isinstance(value, tuple) else value
