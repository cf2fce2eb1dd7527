"""Every setting of dinoray: its default, its unit and what it does, in the one place where it is defined.

`load_config` merges YAML files and `section.key=value` overrides, checks everything, and answers a mistake with one
sentence that names the key, the value and what would do. `dinoray settings` prints these descriptions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from dino_ops.training_presets import PRESETS
from pipelines.storage import secrets

Facet = Literal["key", "query", "value", "token"]
# No model has smaller patches.
SidePixels = Annotated[int, Field(ge=8)]
# Pixels are divided by it.
Deviation = Annotated[float, Field(gt=0)]
Unit = Annotated[float, Field(ge=0, le=1)]
Share = Annotated[float, Field(gt=0, le=1)]


class Section(BaseModel):
    """A section of the YAML: unknown keys are errors, and nothing changes after it was checked."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSettings(Section):
    name: str = Field(
        "dino_vits16",
        description="A timm model name, or dino_vits8 dino_vits16 dino_vitb8 dino_vitb16, dinov2_vits14 (vitb14, "
        "vitl14, vitg14; each with _reg), dinov3_vits16 (vits16plus, vitb16, vitl16, vith16plus, vit7b16). "
        "dinoray_tiny is small, comes with dinoray and needs no network.",
    )
    weights: str = Field(
        "pretrained",
        description="`pretrained` downloads the model's own weights from the hub; a path or URI of a .pth, .pt, .bin "
        "or .safetensors file loads that; `random` means seeded random weights, for trying things out.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="Where the model runs. `auto`: on GPUs when the cluster has any, else on the CPU."
    )
    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Arithmetic of the model. `auto`: bfloat16 autocast on a GPU, float32 on a CPU."
    )
    compile: bool = Field(False, description="torch.compile the blocks; pays on long GPU runs only.")


class ImageSettings(Section):
    shorter_side: SidePixels | None = Field(
        224, description="Resize so that the shorter side has this many pixels; the aspect ratio is kept."
    )
    size: tuple[SidePixels, SidePixels] | None = Field(
        None, description="Resize to exactly [height, width] pixels instead."
    )
    native: bool = Field(False, description="Do not resize: the model sees the pixels of the file.")
    resample: Literal["lanczos", "bicubic"] = Field("lanczos", description="Filter of the (antialiased) resize.")
    crop: Literal["none", "patch"] = Field(
        "none", description="`patch` cuts the right and bottom edge so that both sides are multiples of the patch."
    )
    max_pixels: int = Field(
        178_956_970, ge=1, description="Images with more pixels are refused before a single one is decoded."
    )
    mean: tuple[float, float, float] | None = Field(
        None, description="RGB mean (0..1) subtracted; default: the model's own."
    )
    std: tuple[Deviation, Deviation, Deviation] | None = Field(
        None, description="RGB standard deviation (0..1) divided by; default: the model's own."
    )

    @model_validator(mode="before")
    @classmethod
    def _one_way_to_size(cls, values: Any) -> Any:
        """`size` or `native` replaces the default `shorter_side`; asking for two ways at once is a mistake."""
        if not isinstance(values, Mapping):
            return values
        values = dict(values)
        # `image.size=native` reads naturally, so it is understood too.
        for key in ("size", "shorter_side"):
            if values.get(key) == "native":
                del values[key]
                values["native"] = True
        asked = [key for key in ("shorter_side", "size", "native") if values.get(key)]
        if len(asked) > 1:
            raise ValueError(f"{' and '.join(asked)} exclude each other: give one of them")
        if asked and asked[0] != "shorter_side":
            values["shorter_side"] = None
        if not asked and "shorter_side" in values:
            raise ValueError("shorter_side is empty: give a number of pixels, size=[height, width] or native=true")
        return values


class ExtraFeature(Section):
    layer: int = Field(ge=0, description="Block index, from 0.")
    facet: Facet = Field("key", description="key, query, value or token.")

    @property
    def column(self) -> str:
        return f"descriptor_{self.facet}{self.layer}"


class FeatureSettings(Section):
    layer: int = Field(11, ge=0, description="Block (from 0) that `descriptor` is taken from.")
    facet: Facet = Field("key", description="key, query, value (the block's qkv projection) or token (its output).")
    extra: tuple[ExtraFeature, ...] = Field(
        (), description="Further columns of the same pass: [{layer: 9, facet: key}] adds descriptor_key9."
    )
    stride: int | None = Field(
        None, ge=1, description="Pixels between patches; divides the patch size. Default: the patch size."
    )
    final_norm: bool = Field(False, description="Pass token facets through the model's final LayerNorm.")
    position: Literal["dino", "timm", "centres"] = Field(
        "dino",
        description="How position embeddings meet another grid: as the DINO code does, as timm does, or (models with "
        "rotary positions only) at exact patch centres.",
    )
    saliency_heads: Literal["all"] | tuple[int, ...] = Field(
        "all", description="Heads of the last block whose attention makes the saliency. dino_vits8: [0, 2, 4, 5]."
    )
    channel_order: Literal["head_major", "dim_major"] = Field(
        "head_major", description="dim_major orders channels as dino-vit-features does; distances are the same."
    )
    saliency: bool = Field(True, description="Compute saliency; false leaves the column empty.")
    embedding: bool = Field(
        True, description="Compute the image embedding, which needs the whole model; false leaves the column empty."
    )

    @field_validator("extra")
    @classmethod
    def _no_column_twice(cls, extra: tuple[ExtraFeature, ...]) -> tuple[ExtraFeature, ...]:
        columns = [item.column for item in extra]
        if len(set(columns)) < len(columns):
            raise ValueError(f"names a column twice: {', '.join(columns)}")
        return extra


class StoreSettings(Section):
    dtype: Literal["float16", "float32", "int8"] = Field(
        "float16",
        description="float16: rounded to half precision, stored as FLOAT that every tool reads (1.9 bytes per value); "
        "float32: exact (3.8); int8: with one scale per row (0.9).",
    )
    pca: int | None = Field(None, ge=1, description="Project descriptors to this many dimensions, fitted on a sample.")
    patches: Literal["all", "salient", "none"] = Field("all", description="Which patches are stored.")
    every: int = Field(1, ge=1, description="Store every n-th patch of an image, in raster order.")
    salient_threshold: float = Field(
        0.065,
        ge=0,
        le=1,
        description="Patches above this are salient: for store.patches, cluster.salient_only and salient_votes.",
    )


class RunSettings(Section):
    # They decide about Ray itself, which the jobs of a pipeline share.
    OF_RAY_ITSELF: ClassVar = ("address", "object_store_gb", "metrics_port")

    address: str | None = Field(
        None,
        description="Ray cluster: `auto` on one of its nodes, or its head's host:6379; default: the environment's "
        "RAY_ADDRESS, else a local Ray of the job's own.",
    )
    workers: int | None = Field(None, ge=1, description="Model workers; default: one per GPU, else from the CPUs.")
    cpus_per_worker: float | None = Field(None, gt=0, description="CPUs (torch threads) of a worker.")
    gpus_per_worker: float | None = Field(
        None, ge=0, description="GPUs of a worker; default 1 where there are any, 0 for CPUs only."
    )
    batch_size: Literal["auto"] | int = Field("auto", description="Images in one forward pass; `auto` probes GPUs.")
    images_per_shard: int | None = Field(
        None, ge=1, description="Largest number of images in one file of patches; default: about 256 MB worth."
    )
    commit_seconds: float = Field(30, gt=0, description="Finished shards are committed at least this often.")
    max_failed_fraction: float = Field(
        0.1, ge=0, le=1, description="A run in which a larger share of its images failed exits with 3."
    )
    attempts: int = Field(3, ge=1, description="Tries for a storage request, or for an image whose worker died.")
    max_file_mb: float = Field(
        512, gt=0, description="Larger image files, in 1e6 bytes, are recorded as failures and not read."
    )
    stages: Literal["auto", "fused", "separate"] = Field(
        "auto",
        description="`fused`: one actor fetches, decodes, runs the model and writes; `separate`: three pools of "
        "workers. `auto`: separate with GPUs, fused on CPUs.",
    )
    object_store_gb: float | None = Field(
        None, gt=0, description="Memory of a local Ray's object store; default: Ray's own, 30 % of the machine's."
    )

    metrics_port: int | None = Field(
        None,
        ge=1,
        le=65535,
        description="Port at which a local Ray serves Prometheus metrics; needs the `metrics` extra. A cluster's Ray "
        "was given its own: ray start --metrics-export-port.",
    )

    @field_validator("batch_size")
    @classmethod
    def _positive(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 1:
            raise ValueError("must be `auto` or at least 1")
        return value


class IndexSettings(Section):
    of: Literal["embeddings", "pooled", "patches"] = Field(
        "embeddings",
        description="What is indexed: the image embeddings; one vector an image pooled of its patches; or every "
        "patch, which `search --box` needs.",
    )
    kind: Literal["auto", "flat", "hnsw", "ivfpq"] = Field(
        "auto",
        description="flat: exact; hnsw: a graph, quick for millions; ivfpq: compressed. `auto`: from count, dimension "
        "and memory_gb when the index is first built; it is kept from then on.",
    )
    memory_gb: float | None = Field(
        None, gt=0, description="Memory that the index may take in a search; default: half of this machine's."
    )
    pooling: Literal["mean", "gem"] = Field(
        "mean", description="of=pooled: mean of an image's patches, or generalised mean (power 3) of what is positive."
    )
    descriptor: str = Field(
        "descriptor", description="of=pooled or patches: column of patches, such as descriptor_key9."
    )


class ClusterSettings(Section):
    k: int = Field(100, ge=1, description="Clusters; with `elbow` the most there may be.")
    elbow: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None,
        description="Choose k: the first for which the mean squared distance is above this part of that for k - 1 "
        "(0.975 as published).",
    )
    of: Literal["patches", "embeddings"] = Field("patches", description="What is clustered: patches, or whole images.")
    descriptor: str = Field(
        "descriptor", description="of=patches: column of patches, such as descriptor_key9 from features.extra."
    )
    metric: Literal["cosine", "euclidean"] = Field(
        "cosine", description="cosine: vectors are compared by direction (spherical k-means)."
    )
    salient_only: bool = Field(
        False,
        description="Train on patches whose saliency is above store.salient_threshold; all patches are assigned.",
    )
    sample: int | None = Field(None, ge=1, description="Train on about this many vectors; default: all.")
    iterations: int = Field(50, ge=1, description="Largest number of passes over the data.")
    tolerance: float = Field(
        1e-4, ge=0, description="A pass that lowers the mean distance by less than this part of it is the last."
    )
    seed: int = Field(0, ge=0, description="Seed of the first centroids and of samples.")
    cache_gb: float | None = Field(
        None,
        gt=0,
        description="Memory for vectors, all workers together; what does not fit is read again in every pass. "
        "Default: a third of the memory that Ray has.",
    )
    levels: int = Field(
        1, ge=1, le=4, description="Levels of a tree of clusters, for a k of many thousands: 2 for 100,000."
    )

    @model_validator(mode="after")
    def _one_way_to_choose(self) -> ClusterSettings:
        if self.elbow is not None and self.levels > 1:
            raise ValueError("elbow chooses a small k and levels are for a large one: give one of them")
        return self


class CosegmentSettings(Section):
    sets: str = Field(
        "label",
        description="Which images belong together: `label`; `directory`, the folder in image_id; `cluster:NAME`, the "
        "clusters of images that `dinoray cluster --of embeddings` made; or a .csv, .jsonl or .parquet file with "
        "columns image_id and set_id.",
    )
    descriptor: str = Field(
        "descriptor", description="Column of patches that is clustered, such as descriptor_key9 from features.extra."
    )
    elbow: float = Field(
        0.975, gt=0, lt=1, description="The number of clusters is the first that gains less than 1 - elbow."
    )
    votes_percentage: float = Field(
        75, gt=0, le=100, description="A cluster is foreground when it is salient in this part of the images."
    )
    saliency_threshold: float = Field(
        0.065, ge=0, le=1, description="A cluster is salient in an image when its mean saliency there is above this."
    )
    voting: Literal["published", "relative"] = Field(
        "published",
        description="`relative`: an image votes for a cluster that is more salient than the image's mean, and half of "
        "the images that have it suffice; votes_percentage and saliency_threshold then play no part.",
    )
    sample_interval: int = Field(100, ge=1, description="Clusters are fitted on every n-th patch of an image.")
    num_parts: int = Field(4, ge=1, description="Parts of the foreground.")
    three_stages: bool = Field(False, description="Keep only parts that every image has, then find parts again.")
    elbow_second_stage: float = Field(0.94, gt=0, lt=1, description="three_stages: elbow of the second stage.")
    crop_augmentations: int = Field(
        0, ge=0, description="Random crops of each image, and as many of its mirror image, that join the fit."
    )
    remove_outliers: bool = Field(False, description="Images unlike the others get empty masks and do not vote.")
    outliers_threshold: float = Field(
        0.7, ge=-1, le=1, description="remove_outliers: least cosine of an image with the mean of its set."
    )
    fit_images: int = Field(
        1000, ge=1, description="A set is fitted on at most this many of its images; the others are assigned."
    )
    refine: bool = Field(True, description="Refine foreground with GrabCut and parts with a dense CRF.")
    seed: int = Field(1234, ge=0, description="Seed of the clustering and of crops.")


class CorrespondSettings(Section):
    pairs: str = Field(
        "knn:10",
        description="Which images are matched: `knn:K`, each with the K nearest by cosine of the embeddings; `all`, "
        "all within a label; or a .csv, .jsonl or .parquet file with columns image_a and image_b.",
    )
    descriptor: str = Field(
        "descriptor", description="Column of patches that is compared, such as descriptor_key9 from features.extra."
    )
    binned: bool = Field(True, description="Compare patches together with their surroundings (log-binned).")
    num_pairs: int = Field(10, ge=1, description="Matches selected for a pair of images, spread over the object.")
    saliency_threshold: float = Field(
        0.05, ge=0, le=1, description="Patches whose saliency is above this are foreground."
    )
    foreground: Literal["reference", "strict"] = Field(
        "reference",
        description="`strict`: both patches of a match are foreground; `reference`: the published code's looser rule.",
    )
    keep: Literal["selected", "all"] = Field(
        "selected", description="`all` stores every match in the foreground; those not selected have rank -1."
    )
    seed: int = Field(0, ge=0, description="Seed of the k-means that spreads the selected matches.")
    tile_images: int | None = Field(
        None, ge=1, description="Images whose descriptors are read together; default: about 256 MB worth."
    )


class EvaluateSettings(Section):
    descriptor: str = Field(
        "descriptor", description="Column of patches that pck compares, such as descriptor_key9 from features.extra."
    )
    binned: bool = Field(True, description="pck compares patches together with their surroundings (log-binned).")
    alphas: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (0.05, 0.1, 0.15), min_length=1, description="pck: a point is right within alpha times a length of the target."
    )
    split: Literal["trn", "val", "test"] = Field("test", description="Folder of PairAnnotation that pck reads (SPair).")
    recall_at: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (1, 5, 10), min_length=1, description="retrieval: numbers of nearest images that recall looks at."
    )
    neighbours: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (10, 20, 100, 200), min_length=1, description="knn: numbers of nearest images that vote."
    )
    temperature: float = Field(0.07, gt=0, description="knn: a vote weighs exp(cosine / temperature).")
    epochs: int = Field(100, ge=1, description="linear: passes over the training images.")
    seed: int = Field(0, ge=0, description="linear: seed of the first weights, of the order, and of what is held out.")


class TrainSettings(Section):
    preset: Literal["published", "small_data", "small_batches"] = Field(
        "published",
        description="Defaults of the settings below. published: DINO on ImageNet. small_data: thousands to a hundred "
        "thousand images. small_batches: steps of 16 to 64 images. What is given besides wins.",
    )
    epochs: int = Field(100, ge=1, description="Passes over the images.")
    batch_size: int = Field(64, ge=2, description="Images in a step, all workers together.")
    accumulate: int = Field(
        1,
        ge=1,
        description="Parts in which a worker computes its share of a step, to save memory; the same result, except "
        "that koleo and head_batch_norm look at one part at a time.",
    )
    learning_rate: float = Field(
        5e-4, gt=0, description="Highest learning rate, for 256 images in a step; scaled with batch_size."
    )
    final_learning_rate: float = Field(1e-6, ge=0, description="Learning rate at the end; not scaled.")
    warmup_epochs: float = Field(10, ge=0, description="Epochs in which the learning rate rises from 0.")
    weight_decay: float = Field(0.04, ge=0, description="Weight decay at the beginning; of matrices only.")
    final_weight_decay: float = Field(0.4, ge=0, description="Weight decay at the end.")
    momentum: Unit = Field(0.996, description="Momentum of the teacher at the beginning; it rises to 1.")
    warmup_teacher_temperature: float = Field(
        0.04, gt=0, description="Temperature of the teacher's softmax at the beginning."
    )
    teacher_temperature: float = Field(
        0.04, gt=0, description="Temperature of the teacher's softmax after the warm-up; 0.07 at most."
    )
    warmup_teacher_epochs: int = Field(0, ge=0, description="Epochs in which the teacher's temperature rises.")
    student_temperature: float = Field(0.1, gt=0, description="Temperature of the student's softmax.")
    centring: Literal["mean", "sinkhorn"] = Field(
        "mean", description="mean: DINO's running mean; sinkhorn: DINOv2's balanced assignments of a batch."
    )
    centre_momentum: Unit = Field(0.9, description="Momentum of the running mean.")
    koleo: float = Field(0.0, ge=0, description="Weight of the regulariser that spreads embeddings; DINOv2 has 0.1.")
    clip: float = Field(3.0, ge=0, description="Largest norm of each parameter's gradient; 0: any.")
    freeze_prototypes_epochs: int = Field(1, ge=0, description="Epochs in which the head's last layer does not move.")
    drop_path: float = Field(0.1, ge=0, lt=1, description="Stochastic depth of the student's last block.")
    out_dim: int = Field(65536, ge=2, description="Number of prototypes.")
    head_layers: int = Field(3, ge=1, description="Layers of the projection head.")
    hidden_dim: int = Field(2048, ge=1, description="Width of the projection head.")
    bottleneck_dim: int = Field(256, ge=1, description="Width of the projection head's last layer but one.")
    normalise_prototypes: bool = Field(True, description="Keep prototypes at length 1; steadier.")
    head_batch_norm: bool = Field(
        False, description="Batch normalisation in the projection head: a quicker start from random weights."
    )
    global_size: SidePixels = Field(224, description="Pixels of the two global crops' sides; whole patches.")
    local_size: SidePixels = Field(96, description="Pixels of the local crops' sides; whole patches.")
    local_crops: int = Field(8, ge=0, description="Local crops of an image.")
    global_scale: tuple[Share, Share] = Field((0.4, 1.0), description="Part of the image that a global crop covers.")
    local_scale: tuple[Share, Share] = Field((0.05, 0.4), description="Part of the image that a local crop covers.")
    jitter: tuple[Unit, Unit, Unit, Annotated[float, Field(ge=0, le=0.5)]] = Field(
        (0.4, 0.4, 0.2, 0.1), description="Strength of changes in brightness, contrast, saturation and hue."
    )
    growing_from: Share = Field(
        1.0, description="Crops begin with this part of their size and grow over the epochs, which saves time."
    )
    seed: int = Field(0, ge=0, description="Seed of weights, crops and order.")
    weights_dtype: Literal["float32", "float16"] = Field(
        "float32", description="Precision of backbone.safetensors; checkpoints are always exact."
    )
    validation: str | None = Field(
        None, description="Images with labels, of any INPUT kind, for the k-NN accuracy; default: some of INPUT's own."
    )
    evaluate_epochs: int = Field(5, ge=0, description="Epochs between two measurements of the k-NN accuracy; 0: never.")
    evaluate_images: int = Field(5000, ge=2, description="Largest number of INPUT's images that vote or are tested.")
    checkpoint_steps: int | None = Field(
        None, ge=1, description="Steps between checkpoints, besides the one every checkpoint_minutes."
    )
    checkpoint_minutes: float = Field(
        10, gt=0, description="Minutes between checkpoints, so the most work that is lost."
    )
    keep_checkpoints: int = Field(2, ge=1, description="Number of the latest checkpoints that are kept.")
    log_steps: int = Field(10, ge=1, description="Steps whose means make one line of the log.")

    @model_validator(mode="before")
    @classmethod
    def _preset_below(cls, values: Any) -> Any:
        """What the preset says stands where nothing else was given."""
        if not isinstance(values, Mapping):
            return values
        return {**PRESETS.get(str(values.get("preset", "published")), {}), **values}

    @model_validator(mode="after")
    def _fits_together(self) -> TrainSettings:
        for name in ("global_scale", "local_scale"):
            least, most = getattr(self, name)
            if least > most:
                raise ValueError(f"{name} is [{least}, {most}]: give the smaller part first")
        return self


class CompactSettings(Section):
    target_mb: float = Field(
        256, gt=0, description="Files grow to about this size; those larger than half of it are left alone."
    )
    retention_hours: float = Field(
        168,
        ge=0,
        description="Snapshots younger than this stay readable. No job may run that began longer ago: what it has "
        "written and not committed would be removed.",
    )


class ReportSettings(Section):
    sample: int = Field(48, ge=1, description="Images that are shown where neither --images nor --query chooses them.")
    most_images: int = Field(300, ge=1, description="Largest number of images shown, whatever was chosen.")
    photo_side: int = Field(320, ge=32, le=2048, description="Pixels of a photo's longer side in the page.")
    descriptor: str = Field(
        "descriptor", description="Column of patches that is shown and compared, such as descriptor_key9."
    )
    dimensions: int = Field(64, ge=1, le=512, description="Dimensions of the descriptors in the page, one byte each.")
    most_patches: int = Field(
        1024,
        ge=1,
        description="Patches of an image that are in the page; of a finer grid every n-th row and column.",
    )
    pairs: int = Field(12, ge=0, description="Pairs of images whose matches are drawn, for each matches/NAME.")
    clusters: int = Field(24, ge=0, description="Clusters that have a card, for each clusters/NAME.")
    nearest: int = Field(8, ge=0, description="Images whose nearest ones are shown.")
    seed: int = Field(0, ge=0, description="Seed of the sample of images.")


class StorageSettings(Section):
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="Passed to fsspec for INPUT and STORE (endpoint_url, key, secret, anon, ...). Better: the usual "
        "environment variables and profiles. Never written anywhere.",
    )

    # Wherever there are settings, a worker included, their secrets are known and can be hidden.
    def model_post_init(self, context: Any) -> None:
        secrets.remember(self.options)

    def __setstate__(self, state: dict[Any, Any]) -> None:
        super().__setstate__(state)
        secrets.remember(self.options)


class Config(Section):
    """The settings of a command, after YAML files and overrides."""

    model: ModelSettings = Field(default_factory=ModelSettings)
    image: ImageSettings = Field(default_factory=ImageSettings)
    features: FeatureSettings = Field(default_factory=FeatureSettings)
    store: StoreSettings = Field(default_factory=StoreSettings)
    run: RunSettings = Field(default_factory=RunSettings)
    index: IndexSettings = Field(default_factory=IndexSettings)
    cluster: ClusterSettings = Field(default_factory=ClusterSettings)
    cosegment: CosegmentSettings = Field(default_factory=CosegmentSettings)
    correspond: CorrespondSettings = Field(default_factory=CorrespondSettings)
    evaluate: EvaluateSettings = Field(default_factory=EvaluateSettings)
    compact: CompactSettings = Field(default_factory=CompactSettings)
    train: TrainSettings = Field(default_factory=TrainSettings)
    report: ReportSettings = Field(default_factory=ReportSettings)
    storage: StorageSettings = Field(default_factory=StorageSettings)

    @model_validator(mode="after")
    def _sections_agree(self) -> Config:
        if self.store.patches == "salient" and not self.features.saliency:
            raise ValueError("store.patches=salient needs features.saliency=true")
        own = f"descriptor_{self.features.facet}{self.features.layer}"
        if own in [item.column for item in self.features.extra]:
            raise ValueError(f"features.extra repeats the main descriptor ({own[11:]}): remove it there")
        return self

    def without_secrets(self) -> dict[str, Any]:
        """The settings as plain data, to be shown or stored: URIs have no credentials, storage options no values."""
        settings = self.model_dump(mode="json", exclude={"storage"})
        settings["storage"] = {"options": dict.fromkeys(self.storage.options, secrets.HIDDEN)}
        shown: dict[str, Any] = secrets.hidden_in(settings)
        return shown
