"""Which bridge to take: four questions, their answers, and the code to paste."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field

from helpers.errors import Chapter

CHAPTERS = {
    slug: Chapter(number, slug, question)
    for number, slug, question in (
        ("02", "pooling_linear", "my decoder wants a vector"),
        ("03", "conv_projection", "my decoder wants other channels"),
        ("04", "attention", "which positions matter?"),
        ("05", "unet", "my masks are blobs"),
        ("07", "spatial_pyramid", "any input size, and more context?"),
        ("09", "conditional_concat", "can the features decide what enters?"),
        ("10", "input_mapping", "my decoder brings an input of its own"),
        ("11", "sequences", "my decoder writes words"),
        ("12", "putting_together", "so which decoder should I use?"),
    )
}


# --- the bridges: the one table ------------------------------------------------------------------


@dataclass(frozen=True)
class Bridge:
    """One bridge of the book, and the lines that use it.

    `takes → gives` is the shape contract; its names are those of arguments in `lines`. `imports`
    are names by module of `helpers.bridges`. In `lines`, `{channels}`, `{query}` and `{mapper}`
    stand for what depends on the answers. `record` is its name in `results/benchmark.json`.
    """

    name: str
    module: str
    kind: str
    takes: str
    gives: str
    purpose: str
    imports: Mapping[str, tuple[str, ...]]
    lines: str
    record: str = ""

    @property
    def contract(self) -> str:
        return f"{self.takes} → {self.gives}"

    @property
    def chapter(self) -> Chapter:
        return CHAPTERS[self.module]


PYRAMID = "c1…c5"
LOGITS = """\
model = Segmenter(encoder, decoder)
logits = model(normalize(images))
print(list(logits.shape))  # [2, {channels}, 180, 240]
"""

BRIDGES = {
    "book": Bridge(
        "BookDecoder",
        "putting_together",
        "decoder",
        PYRAMID,
        "[B, out_channels, H, W]",
        "masks or pictures: the default",
        {"putting_together": ("BookDecoder",)},
        "decoder = BookDecoder(encoder.out_channels, out_channels={channels})\n" + LOGITS,
        "book decoder",
    ),
    "context": Bridge(
        "ContextDecoder",
        "spatial_pyramid",
        "decoder",
        PYRAMID,
        "[B, out_channels, H, W]",
        "masks for the least work: c2, c3, and an encoder that ends there",
        {"spatial_pyramid": ("ContextDecoder",)},
        "decoder = ContextDecoder(encoder.out_channels, out_channels={channels}, level=3)\n"
        + LOGITS.replace("(encoder,", "(ShortEncoder(encoder, levels=3),"),
        "c3, PPM",
    ),
    "summed": Bridge(
        "AdaptedDecoder",
        "conv_projection",
        "decoder",
        PYRAMID,
        "[B, out_channels, H, W]",
        "masks for little work: a 1×1 for each map, summed",
        {"conv_projection": ("AdaptedDecoder",)},
        "decoder = AdaptedDecoder(encoder.out_channels, out_channels={channels})\n" + LOGITS,
        "1×1, summed",
    ),
    "beside": Bridge(
        "ConditionalDecoder",
        "conditional_concat",
        "decoder",
        f"{PYRAMID} and the image",
        "[B, out_channels, H, W]",
        "masks from features beside the image",
        {"conditional_concat": ("Concat", "ConditionalDecoder")},
        "decoder = ConditionalDecoder(\n"
        "    encoder.out_channels, out_channels={channels}, join=Concat\n)\n" + LOGITS,
    ),
    "pointing": Bridge(
        "PointingDecoder",
        "input_mapping",
        "decoder",
        f"{PYRAMID} and a query",
        "[B, out_channels, H, W]",
        "the mask of what a query asks for",
        {"input_mapping": ("PointingDecoder",)},
        "{query}\n{mapper}"
        "decoder = PointingDecoder(\n"
        "    encoder.out_channels, out_channels={channels}, mapper=mapper, features=32\n)\n"
        "model = Segmenter(encoder, decoder)\n"
        "logits = model(normalize(images), query=query)\n"
        "print(list(logits.shape))  # [2, {channels}, 180, 240]\n",
    ),
    "pool": Bridge(
        "PoolLinear",
        "pooling_linear",
        "vector",
        "[B, C, h, w]",
        "[B, out_features]",
        "what is there, not where",
        {"pooling_linear": ("PoolLinear",)},
        "bridge = PoolLinear(512, out_features=256)\n"
        "vector = bridge(encoder(normalize(images)).c5)\n"
        "print(list(vector.shape))  # [2, 256]\n",
    ),
    "grid": Bridge(
        "GridLinear",
        "pooling_linear",
        "vector",
        "[B, C, h, w]",
        "[B, out_features]",
        "what is there, and roughly where",
        {"pooling_linear": ("GridLinear",)},
        "bridge = GridLinear(512, out_features=256, grid=2)\n"
        "vector = bridge(encoder(normalize(images)).c5)\n"
        "print(list(vector.shape))  # [2, 256]\n",
    ),
    "joined": Bridge(
        "JoinedVector",
        "input_mapping",
        "vector",
        "c5 and a query",
        "[B, in_channels + out_features]",
        "a vector of the image and of your input",
        {"input_mapping": ("JoinedVector",)},
        "{query}\n{mapper}"
        "bridge = JoinedVector(in_channels=512, mapper=mapper)\n"
        "vector = bridge(encoder(normalize(images)).c5, query)\n"
        "print(list(vector.shape))  # [2, 544]\n",
    ),
    "tokens": Bridge(
        "PositionTokens",
        "sequences",
        "tokens",
        PYRAMID,
        "[B, ⌈H/16⌉·⌈W/16⌉ + ⌈H/32⌉·⌈W/32⌉, width]",
        "every position of c4 and c5, for a Transformer",
        {"sequences": ("PositionTokens",)},
        "bridge = PositionTokens(encoder.out_channels, width=128)\n"
        "tokens = bridge(encoder(normalize(images)))\n"
        "print(list(tokens.shape))  # [2, 228, 128]\n",
    ),
    "reader": Bridge(
        "QueryReader",
        "attention",
        "tokens",
        "[B, C, h, w]",
        "[B, queries, width]",
        "a few learned queries, each a vector",
        {"attention": ("QueryReader",)},
        "bridge = QueryReader(256, queries=10, width=64)\n"
        "tokens = bridge(encoder(normalize(images)).c4)\n"
        "print(list(tokens.shape))  # [2, 10, 64]\n",
    ),
    "look": Bridge(
        "CrossAttention",
        "sequences",
        "tokens",
        "[B, 1, width] and tokens [B, N, width]",
        "[B, 1, width]",
        "your input looks around in the image",
        {"sequences": ("CrossAttention", "PositionTokens")},
        "{query}\n{mapper}"
        "tokens = PositionTokens(encoder.out_channels, width=32)\n"
        "bridge = CrossAttention(width=32)\n"
        "found = bridge(mapper(query)[:, None], tokens(encoder(normalize(images))))\n"
        "print(list(found.shape))  # [2, 1, 32]\n",
    ),
    "caption": Bridge(
        "CaptionTransformer",
        "sequences",
        "words",
        f"{PYRAMID} and words [B, T]",
        "[B, T, words]",
        "sentences: each word looks at the positions",
        {"sequences": ("CaptionTransformer", "Vocabulary")},
        'vocabulary = Vocabulary(["a", "cat", "dog", "sleeps"])\n'
        "decoder = CaptionTransformer(encoder.out_channels, words=len(vocabulary))\n"
        'words = vocabulary.encode(["a cat sleeps", "a dog sleeps"])\n'
        "logits = decoder(encoder(normalize(images)), words[:, :-1])  # of the next words\n"
        "print(list(logits.shape))  # [2, 4, 7]\n",
    ),
    "gru": Bridge(
        "StateGRU",
        "sequences",
        "words",
        f"{PYRAMID} and words [B, T]",
        "[B, T, words]",
        "sentences for little work: a GRU sees the image once",
        {"sequences": ("StateGRU", "Vocabulary")},
        'vocabulary = Vocabulary(["a", "cat", "dog", "sleeps"])\n'
        "decoder = StateGRU(encoder.out_channels, words=len(vocabulary))\n"
        'words = vocabulary.encode(["a cat sleeps", "a dog sleeps"])\n'
        "logits = decoder(encoder(normalize(images)), words[:, :-1])  # of the next words\n"
        "print(list(logits.shape))  # [2, 4, 7]\n",
    ),
    "project": Bridge(
        "project_to",
        "conv_projection",
        "map",
        "[B, C, H, W]",
        "[B, out_channels, h, w]",
        "other channels, another size: a 1×1",
        {"conv_projection": ("project_to",)},
        "conv = torch.nn.Conv2d(256, out_channels=64, kernel_size=1)\n"
        "map_ = project_to(conv, encoder(normalize(images)).c4, size=(45, 60))\n"
        "print(list(map_.shape))  # [2, 64, 45, 60]\n",
    ),
    "concat": Bridge(
        "Concat",
        "conditional_concat",
        "map",
        "[B, in_channels, h, w] and [B, fine_channels, H, W]",
        "[B, in_channels + fine_channels, H, W]",
        "features beside the image",
        {"conditional_concat": ("Concat",)},
        "x = normalize(images)\n"
        "bridge = Concat(in_channels=128, fine_channels=3)\n"
        "map_ = bridge(encoder(x).c3, x)\n"
        "print(list(map_.shape))  # [2, 131, 180, 240]\n",
    ),
    "film": Bridge(
        "FiLMFusion",
        "input_mapping",
        "map",
        "[B, channels, H, W] and [B, features]",
        "[B, channels, H, W]",
        "a vector of yours scales and shifts a map",
        {"input_mapping": ("FiLMFusion",), "putting_together": ("BookDecoder",)},
        "{query}\n{mapper}"
        "model = Segmenter(encoder, BookDecoder(encoder.out_channels, out_channels=32))\n"
        "bridge = FiLMFusion(channels=32, features=32)\n"
        "map_ = bridge(model(normalize(images)), mapper(query))\n"
        "print(list(map_.shape))  # [2, 32, 180, 240]\n",
    ),
    "join": Bridge(
        "FeatureAdaptation",
        "conv_projection",
        "map",
        "[B, in_channels, h, w] and [B, skip_channels, H, W]",
        "[B, out_channels, h, w]",
        "your map and one of the encoder's, summed",
        {"conv_projection": ("FeatureAdaptation",)},
        "x = torch.rand(2, 48, 45, 60)  # yours\n"
        "bridge = FeatureAdaptation(in_channels=48, skip_channels=512, out_channels=64)\n"
        "map_ = bridge(x, encoder(normalize(images)).c5)\n"
        "print(list(map_.shape))  # [2, 64, 45, 60]\n",
    ),
    "up": Bridge(
        "UpBlock",
        "unet",
        "map",
        "[B, in_channels, h, w] and [B, skip_channels, ⌈H/2⌉, ⌈W/2⌉]",
        "[B, out_channels, ⌈H/2⌉, ⌈W/2⌉]",
        "your map climbs to a finer one of the encoder's",
        {"unet": ("UpBlock",)},
        "x = torch.rand(2, 48, 45, 60)  # yours\n"
        "bridge = UpBlock(in_channels=48, skip_channels=64, out_channels=32)\n"
        "map_ = bridge(x, encoder(normalize(images)).c1)\n"
        "print(list(map_.shape))  # [2, 32, 90, 120]\n",
    ),
}

# --- the questions and their answers -------------------------------------------------------------

QUESTIONS: dict[str, tuple[str, dict[str, str]]] = {
    "out": (
        "What should come out?",
        {
            "mask": "a mask: a class for each pixel",
            "image": "a picture: colours for each pixel",
            "vector": "one vector for each image",
            "tokens": "tokens, for a Transformer",
            "words": "words: a sentence",
            "map": "a map, for a decoder of my own",
        },
    ),
    "own_input": (
        "What else goes in?",
        {
            "none": "nothing",
            "image": "the image itself, once more",
            "vector": "a vector of mine: a query, counts of words, HOG",
            "picture": "another picture",
            "map": "a map of my own decoder",
        },
    ),
    "need": (
        "What counts most?",
        {
            "default": "good all round",
            "thin": "thin and small things, outlines",
            "large": "large things, context",
            "budget": "as little work as possible",
            "size": "images of any size",
        },
    ),
    "encoder": (
        "May the encoder learn along?",
        {"frozen": "no, it stays as it is", "tuned": "yes, fine-tune it"},
    ),
}

# What comes out, what goes in, what counts ("*": whatever it is) → the bridge, and why. The first
# line that fits counts. A test holds this against the records of results/: change the answer here.
ANSWERS = (
    (
        *("mask", "none", "default", "book"),
        "The book's default for masks. It reads all five maps, from coarse to fine, each made slim "
        "first; chapter 12 takes its parts away one by one.",
    ),
    (
        *("mask", "none", "thin", "book"),
        "Thin things and outlines are in c1 and c2, and it reads both. Its logits lie at half the "
        "image's resolution: what is thinner than two pixels stays hard. With the image beside the "
        "features, `ConditionalDecoder` drew sharper outlines on drawn scenes and coarser ones on "
        "streets: answer that the image goes in, and try.",
    ),
    (
        *("mask", "none", "large", "book"),
        "Large things need context, and at c5 a position sees nearly everything. Pooling still "
        "more in, there or on c3, brought nothing that this decoder lacks, and on streets nothing "
        "in the book was clearly better at sky, buildings and road.",
    ),
    (
        *("mask", "none", "budget", "context"),
        "It reads c2 and c3 only, so the encoder can end there: together they take less time than "
        "the encoder would by itself. Pooling over parts of c3 makes up for some of the context "
        "that c4 and c5 would bring. With `ASPP` as its `context` it takes little more work, and "
        "gained over two points on scenes.",
    ),
    (
        *("mask", "none", "size", "book"),
        "All decoders of the book take any H and W from 32 on, divisible by 32 or not, so take the "
        "default. But train at the sizes that you will meet: that it runs at another size does not "
        "mean that it reads it as well.",
    ),
    (
        *("image", "none", "budget", "context"),
        "It reads c2 and c3 only, so the encoder can end there: together they take less time than "
        "the encoder would by itself. The book measured that for masks; for pictures, compare it "
        "with `BookDecoder`.",
    ),
    (
        *("image", "none", "*", "book"),
        "Three channels in place of classes; all else stays. Learn what a cheap answer lacks (a "
        "grey picture, a blurred one), with L1, and compare with the cheap answer: chapter 12. "
        "Any size from 32 × 32 will do; what is thinner than two pixels stays hard.",
    ),
    (
        *("mask image", "image", "budget", "summed"),
        "Leave the image out: all that is done with it is done at full resolution. This sums c2 "
        "to c5, which have seen the image already. For less work still, answer that nothing else "
        "goes in.",
    ),
    (
        *("mask image", "image", "*", "beside"),
        "A shallow map of the image, at full resolution, beside c3 to c5: the image brings "
        "outlines, the features what they are outlines of. Plain concatenation will do; no mask "
        "or gate was clearly ahead of it. Compare it with `BookDecoder`, whose c1 and c2 bring "
        "outlines, too.",
    ),
    (
        *("mask image", "vector picture", "thin", "pointing"),
        "The query chooses what is drawn, and c2's grid how finely: what is thinner than four "
        "pixels stays hard. Finer, but not measured: `FiLMFusion` on a map (ask for a map here) "
        "and a 1×1 convolution behind it.",
    ),
    (
        *("mask image", "vector picture", "*", "pointing"),
        "The query scales and shifts the map's channels, so that one network draws what you ask "
        "for. It reads c2 to c5 of images of any size and adds little work to the encoder's. It "
        "was measured for masks.",
    ),
    (
        *("mask image", "map", "thin", "up"),
        "Your map climbs to the grid of c1, where the outlines are. Behind it, a 1×1 convolution "
        "to your classes or colours, and a resize to the image.",
    ),
    (
        *("mask image", "map", "*", "join"),
        "A 1×1 convolution for each of the two, and a sum on the grid of yours, at any size. "
        "Behind it, a 1×1 convolution to your classes or colours, and a resize to the image. c5 "
        "has seen the most context; c3 or c2 know better where things are.",
    ),
    (
        *("map", "none", "thin", "book"),
        "A decoder's output is a map, too: ask for as many channels as yours wants. c1 and c2 "
        "bring the outlines. `decoder(pyramid)` alone returns it on c1's grid.",
    ),
    (
        *("map", "none", "large", "book"),
        "A decoder's output is a map, too: ask for as many channels as yours wants. c5 brings the "
        "context, the finer maps say where.",
    ),
    (
        *("map", "none", "*", "project"),
        "Other channels are a 1×1 convolution, and never a `reshape`. It runs on the smaller of "
        "the two grids: the same result for less work. c4 is an example; any of the five maps of "
        "an image of any size will do.",
    ),
    (
        *("map", "image", "*", "concat"),
        "The features are brought to the image's size and laid beside it, at any size; nothing is "
        "learnt yet. Put at least two 3×3 convolutions behind it: raw pixels alone are no "
        "outlines. They are most of the work. c5 in place of c3 brings more context.",
    ),
    (
        *("map", "vector picture", "*", "film"),
        "A number to multiply by and one to add, for each channel. The map is the default "
        "decoder's, at the image's size, whichever that is; any other map of yours will do, "
        "and a coarser one costs less.",
    ),
    (
        *("map", "map", "thin", "up"),
        "Your map climbs to the grid of c1, where the outlines are, and is convolved there "
        "together with it.",
    ),
    (
        *("map", "map", "*", "join"),
        "A 1×1 convolution for each of the two, and a sum on the grid of yours, at any size. c5 "
        "has seen the most context; c3 or c2 know better where things are.",
    ),
    (
        *("vector", "none", "thin", "grid"),
        "A vector has no outlines, and a mean forgets places and drowns what is small. The means "
        "of 2 × 2 cells keep roughly where things are. If outlines count, ask for a map or for "
        "tokens.",
    ),
    (
        *("vector", "none", "*", "pool"),
        "The mean over all positions, then a linear layer: one length for images of any size, and "
        "hardly any work. It tells what is there and forgets where; `GridLinear` keeps roughly "
        "where. Spatial pyramids told no more of what is there than the mean did.",
    ),
    (
        *("vector", "image", "*", "pool"),
        "The image need not enter twice: a vector has no outlines that it could add, and the "
        "encoder has read it. So take the mean over all positions, then a linear layer: any size, "
        "hardly any work.",
    ),
    (
        *("vector", "vector picture map", "*", "joined"),
        "The image, pooled, beside what your input says. What reads it must bend (a ReLU between "
        "two layers), or your input can only shift the answer. Pooling forgets places: where thin "
        "or small things count, ask for a map or for tokens.",
    ),
    (
        *("tokens", "none", "budget", "reader"),
        "Each of a few learned queries gathers what it needs from c4: ten tokens in place of "
        "hundreds, for whatever comes behind.",
    ),
    (
        *("tokens", "none", "size", "reader"),
        "As many tokens as queries, whatever the image's size. (`PositionTokens` takes any size, "
        "too, and returns more tokens for larger images.)",
    ),
    (
        *("tokens", "none", "*", "tokens"),
        "Each position of c4 and c5 is a token that knows its place, so that whatever comes behind "
        "can look where it wants, at details and at the whole. A token stands for 16 × 16 "
        "pixels or more: for thin things, ask for a map.",
    ),
    (
        *("tokens", "image", "*", "tokens"),
        "The image need not enter twice: the encoder has read it, and as tokens its pixels would "
        "be far too many. Each position of c4 and c5 is a token that knows its place, for any "
        "size. For thin things or for less work, ask for a map or for a vector.",
    ),
    (
        *("tokens", "vector picture map", "*", "look"),
        "Cross-attention: your input asks, and the positions of c4 and c5, of images of any size, "
        "answer. A position stands for 16 × 16 pixels or more: for thin things, ask for a map. It "
        "was measured where words ask (chapter 11), not with another input.",
    ),
    (
        *("words", "none", "budget", "gru"),
        "It sees the image once, as its first state, and is cheap at each word. Expect whole "
        "sentences to be right far less often than with `CaptionTransformer`.",
    ),
    (
        *("words", "none", "*", "caption"),
        "Each word looks at the positions of c4 and c5, and that choice is what made the "
        "difference. Images of any size. A position stands for 16 × 16 pixels or more: do not "
        "expect it to speak of thin things.",
    ),
    (
        *("words", "image", "*", "caption"),
        "The image need not enter twice: the encoder has read it, and a sentence needs no "
        "outlines. Each word looks at the positions of c4 and c5, at any size. For less work: "
        "`StateGRU`.",
    ),
    (
        *("words", "vector picture map", "*", "caption"),
        "No captioner of the book has an input of its own. Make yours one more token (not "
        "measured): a mapper brings it to `[B, 96]`, then "
        "`memory = torch.cat([decoder.read(pyramid), mapped[:, None]], dim=1)` and "
        "`logits = decoder.say(memory, words[:, :-1])`.",
    ),
)
TUNED = (
    "Fine-tuned: give the encoder a smaller learning rate than what is new (`fit` has `rate` and "
    "`encoder_rate`), and expect steps that cost more: its maps can no longer be kept."
)
# What depends on the input of your own: what to import, its lines, the mapper for it.
OWN = {
    "vector": (
        {"input_mapping": ("LinearMapper",)},
        "query = torch.rand(2, 15)  # yours, standardised: one vector an image",
        "mapper = LinearMapper(15, out_features=32)\n",
    ),
    "picture": (
        {"input_mapping": ("LinearMapper",)},
        "pictures = normalize(torch.rand(2, 3, 64, 64))  # yours: one an image\n"
        "query = torch.cat([map_.mean((2, 3)) for map_ in encoder(pictures)], dim=1)",
        "mapper = LinearMapper(1024, out_features=32)\n",
    ),
    "map": (
        {"pooling_linear": ("PoolLinear",)},
        "query = torch.rand(2, 48, 45, 60)  # yours",
        "mapper = PoolLinear(48, out_features=32)\n",
    ),
}


@dataclass(frozen=True)
class Suggestion:
    """A bridge, its module and chapter, its shape contract, why, and a program to paste."""

    bridge: str
    module: str
    chapter: Chapter
    contract: str
    why: str
    code: str = field(repr=False)

    def __str__(self) -> str:
        why = textwrap.fill(self.why, 80, break_long_words=False, break_on_hyphens=False)
        return f"{self.bridge}, {self.chapter}\n{self.contract}\n\n{why}\n\n{self.code}"

    def _repr_markdown_(self) -> str:
        head = f"**`{self.bridge}`**, {self.chapter}"
        return f"{head}\n\n`{self.contract}`\n\n{self.why}\n\n```python\n{self.code}```\n"


def suggest(
    out: str = "mask",
    own_input: str = "none",
    need: str = "default",
    encoder: str = "frozen",
) -> Suggestion:
    """Return the bridge to take, with the code to paste; the four answers are keys of `QUESTIONS`.

    `out` is what should come out: "mask", "image", "vector", "tokens", "words" or "map".
    `own_input` is what goes in beside the encoder's maps: "none", "image", "vector", "picture" or
    "map". `need` is what counts most: "default", "thin", "large", "budget" or "size". `encoder` is
    "frozen" or "tuned". Raises `ValueError` for anything else.
    """
    given = {"out": out, "own_input": own_input, "need": need, "encoder": encoder}
    _check(given)
    key, why = next(
        (key, why)
        for outs, inputs, needs, key, why in ANSWERS
        if out in outs.split() and own_input in inputs.split() and needs in ("*", need)
    )
    bridge = BRIDGES[key]
    tuned = encoder == "tuned"
    return Suggestion(
        bridge.name,
        f"helpers.bridges.{bridge.module}",
        bridge.chapter,
        bridge.contract,
        f"{why} {TUNED}" if tuned else why,
        _code(bridge, out, own_input, tuned),
    )


def _check(given: Mapping[str, str]) -> None:
    wrong = [
        f"Expected {name} to be one of {', '.join(map(repr, QUESTIONS[name][1]))}; got {value!r}."
        for name, value in given.items()
        if value not in tuple(QUESTIONS[name][1])
    ]
    if wrong:
        raise ValueError(f"{' '.join(wrong)} For example: suggest(out='mask', need='thin').")


def _code(bridge: Bridge, out: str, own_input: str, tuned: bool) -> str:
    """Return a complete program: imports, an encoder, images, the bridge, the shape."""
    imports = {module: set(names) for module, names in bridge.imports.items()}
    lines, query, mapper = bridge.lines, "", ""
    if "{mapper}" in lines:
        extra, query, mapper = OWN[own_input]
        for module, names in extra.items():
            imports.setdefault(module, set()).update(names)
    channels = {"mask": 1 if bridge.name == "PointingDecoder" else 7, "image": 3}.get(out, 64)
    for name, text in {"query": query, "mapper": mapper, "channels": str(channels)}.items():
        lines = lines.replace(f"{{{name}}}", text)
    parts = [name for name in ("Segmenter", "ShortEncoder") if f"{name}(" in lines]
    return "\n".join(
        [
            "import torch",
            *(
                f"from helpers.bridges.{module} import {', '.join(sorted(imports[module]))}"
                for module in sorted(imports)
            ),
            f"from helpers.encoder import {', '.join(['ResNet18Encoder', *parts, 'normalize'])}",
            "",
            f"encoder = ResNet18Encoder({'frozen=False' if tuned else ''})",
            "images = torch.rand(2, 3, 180, 240)  # yours: RGB, values in 0…1",
            lines,
        ]
    )
