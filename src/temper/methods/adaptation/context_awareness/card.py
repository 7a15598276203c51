"""Context awareness: find out whether a chat template costs a model its eye for the user's text, and give it back.

Paper         On the loss of context awareness in general instruction fine-tuning. Wang et al., 2024,
              https://arxiv.org/abs/2411.02688 (Sec. 3: needle tests and attention; Sec. 4: steering; Sec. 5: indicator).
What you get  Three tools for chat models that pass over the document they were given. `measure`: needle-in-a-haystack
              recall with and without the chat template, beside the share of attention that user tokens get. `fit` with
              mode=steer: a steering artefact, no training, that makes every head look more at user tokens. `make` and
              `fit` with mode=indicator: tag the training turns that depend on their context with [IND]; the tuned model
              relies on the context when [IND] is there (mode=switch gives the prompt artefact that puts it there).

Idea          Fine-tuning on chats teaches a model that what it knows often suffices. The bias is tied to the template's
              role marks: they draw attention that user tokens had. So take the template away (diagnosis), weigh attention
              back (steering), or let training say when context matters (indicator), so that the rest of the data cannot
              teach neglect.

Maths         Att_h(y, x)  attention probability of head h from token y to token x, in one middle layer (15 of 32)
              U      tokens of all user messages;  BOS  first position;  R  response tokens
              Shares: a_h(G) = sum over x in G of Att_h(y, x) for G in {BOS, U, R}; template tokens are left out and the
                      three are divided by their sum; mean over the first reply tokens y. Reported for the retrieval head,
                      the one with the largest mean a_h(U) without template.
              Recall: mean over a needle's keywords of [keyword is a word of the first tokens of the reply], lower case,
                      punctuation stripped; recall_all is 1 if all are there. Tests are lengths x depths x needles.
              Steering (every layer and head, every query):
                      Att'(y, x) = Att(y, x) / Z        if x in U
                                 = alpha Att(y, x) / Z  if x is another prompt token,   0 < alpha <= 1, Z renormalises
                      that is, log(alpha) is added to the attention logits of prompt keys outside U. Applied with strength s
                      alpha becomes alpha^s: 0 is off, 1 as fitted, 2 twice as strong.
              Dependency of turn m with reply tokens Y_m on the user messages X_1..X_m, by a seed model M:
                      s_M(Y_m) = 1/|Y_m| sum over y in Y_m of max over h of sum over x in X_1 u ... u X_m of Att_h(y, x)
                      x are user tokens only (no template, BOS, EOS or line-break tokens); no renormalisation. A turn is
                      context-dependent if s > beta. A turn without a reply, or cut by score_max_tokens, has s = -1.
              Indicator: X_m of such a turn gets " [IND]" (after a full stop if it ends in a letter or digit). [IND] is one
                      new vocabulary row. Then plain SFT, loss on assistant turns.

Departures    1. One mask for the union of all user spans. The released hook adds log(alpha) outside each span in turn, so
                 with two user messages each is pushed down by the other's pass, and the template by both.
              2. Keys written during generation keep their weight (the released code) unless steer_generated is set (the
                 paper's text).
              3. [IND] follows the message's last token at once; as released the space before it is a token too. The full
                 stop belongs to tagged data; at inference the message stays as it stands.
              4. Typed text never is the indicator: "[IND]" becomes the control id only at the end of a tagged training
                 message, or by a prompt artefact.
              5. The BOS group is the first position, whatever stands there: tokenizers without BOS have their attention
                 sink on it, and it would count as a user token.
              6. User spans come from the template's own account, not from a search for the text, so repeated, trimmed or
                 normalised text cannot be mistaken.
              7. The reply's end-of-turn token is not among Y_m.
              8. The haystack is generated prose with invented needles; the paper's is a published text.
              9. beta may be "median", the middle of the scores at hand: the paper's 0.6 belongs to its seed model.
             10. Without template the reply cannot end itself: bare text has no turn to end, and chat models asked so often
                 write their end token at once, which says nothing of what they saw.

Limits        Steering hurts reasoning over the context; keep alpha near 1. It needs eager or sdpa attention and a chat
              template; ids that no template wrote are not steered (a warning says so). A base without template has no
              diagnosis. Scores depend on the seed model and layer. The conversations that come with it are short and made
              up; take your own data for more than a check. Nothing filters refusals from the data: do so before.
Reference code  github.com/YihanWang617/context_awareness (no licence at its top level; facts only).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from temper.core.card import Card, Claim

INDICATOR = "[IND]"


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of context awareness."""

    mode: Literal["steer", "indicator", "vanilla", "switch"] = "steer"
    """What `fit` leaves: attention steering, SFT with [IND], the same SFT without it, or the prompt that adds [IND]."""
    alpha: float = 0.95
    """Weight of prompt tokens outside user messages (Table 3); 1 changes nothing."""
    steer_generated: bool = False
    """Weigh the tokens written so far with alpha too."""
    layers: tuple[int, ...] = ()
    """Layers to steer; empty = all (paper)."""
    heads: tuple[int, ...] = ()
    """Heads to steer; empty = all (paper)."""
    layer: int | None = None
    """Layer whose attention is read, from 0; None = the middle one."""
    beta: float | Literal["median"] = 0.6
    """A turn scored above this depends on its context; "median" = the middle of the scores."""
    score_max_tokens: int = 2047
    """Longest conversation that is scored; later turns get -1."""
    num_conversations: int = 300
    """How many conversations of our own are used where no data is given."""
    probe: Literal["needles", "answers", "dependency"] = "needles"
    """What `measure` does: needle tests, containment of `answer` in replies, or how s separates context from chat turns."""
    lengths: tuple[int, ...] = tuple(range(200, 4001, 200))
    """Context lengths in tokens; 20 as in the paper, the values are ours."""
    depths: tuple[float, ...] = tuple(round(i / 19, 3) for i in range(20))
    """Places of the needle from 0 (start) to 1 (end); 20 as in the paper."""
    num_needles: int = 1
    """Needles tried in every cell of the grid."""
    num_distractors: int = 0
    """Sentences of the needle's form about other places in every context; 0 = paper. They make small grids harder."""
    alphas: tuple[float, ...] = (0.95,)
    """Steering factors tried by the needle tests."""
    reply_tokens: int = 100
    """Tokens of the reply in which keywords count."""
    share_items: int = 400
    """Needle tests whose attention is read, spread over the grid; 0 = none."""
    share_tokens: int = 1
    """First reply tokens over which attention shares are averaged."""
    tuning: Literal["full", "lora"] = "full"
    """Train all weights, or adapters and the new row."""
    rank: int = 16
    """LoRA rank."""
    lora_alpha: float = 16
    """LoRA scale."""
    dropout: float = 0.05
    """LoRA dropout."""
    lr: float = 2e-5
    """Peak learning rate (TinyLlama; 2e-4 with adapters on 7B models)."""
    num_epochs: float = 1
    """Passes over the conversations."""
    batch_rows: int = 32
    """Conversations per optimiser step."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Learning-rate schedule."""
    warmup_ratio: float = 0.1
    """Share of the steps spent warming up."""
    max_tokens: int = 2048
    """Longest conversation trained on; a longer one is cut."""

    def __post_init__(self) -> None:
        for alpha in (self.alpha, *self.alphas):
            if not 0 < alpha <= 1:
                raise ValueError(f"alpha must lie in (0, 1], not {alpha}")
        if not (self.lengths and self.depths and self.num_needles > 0):
            raise ValueError("the needle grid is empty: give lengths, depths and at least one needle")
        if min(self.lengths) < 1:
            raise ValueError(f"lengths are tokens, at least 1, not {min(self.lengths)}")
        if not all(0 <= depth <= 1 for depth in self.depths):
            raise ValueError("depths must lie in [0, 1]")
        for name in ("reply_tokens", "share_tokens", "score_max_tokens", "num_conversations", "max_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("share_items", "num_distractors"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, not {getattr(self, name)}")


CARD = Card(
    title="Context awareness: needle tests, attention steering and a context indicator",
    paper="arXiv:2411.02688",
    verbs=("measure", "fit", "make"),
    config=Config,
    needs=frozenset({"generate", "attention", "grads"}),
    data={"measure": {"test?": "Dialogue"}, "fit": {"train?": "Dialogue"}, "make": {"train?": "Dialogue"}},
    produces=("steer", "weights", "adapter", "prompt"),
    claims=(
        Claim(
            id="template-costs-recall",
            sentence="Without the chat template the model finds at least as many needles as with it.",
            metric="recall",
            arm="diagnosis/no_template",
            baseline="diagnosis/template",
            direction="higher",
            paper="error rises with the template in 7 of 8 models; Llama-2-7B-chat .9917 with, .9975 without",
        ),
        Claim(
            id="steering-helps-recall",
            sentence="Steering with alpha 0.9 raises needle recall with the template.",
            metric="recall",
            arm="diagnosis/steered_0.9",
            baseline="diagnosis/template",
            direction="higher",
            paper="Llama-2-7B-chat at 0.95: .9917 -> .9932",
        ),
        Claim(
            id="score-separates",
            sentence="The dependency score ranks context questions above chat turns (AUC above 0.7).",
            metric="dependency_auc",
            arm="diagnosis",
            baseline=0.7,
            direction="higher",
            paper="not reported",
        ),
        Claim(
            id="score-is-not-length",
            sentence="It also ranks them above chat turns that hold a passage and pass over it (AUC above 0.7).",
            metric="dependency_auc_aside",
            arm="diagnosis",
            baseline=0.7,
            direction="higher",
            paper="not reported; a check of ours, for a longer user message alone draws more attention",
        ),
        Claim(
            id="indicator-beats-vanilla",
            sentence="SFT with [IND], switched on, answers from the passage more often than the same SFT without it.",
            metric="contained",
            arm="indicator",
            baseline="vanilla",
            direction="higher",
            paper="SQuAD up in 9 of 9 model and data pairs, e.g. TinyLlama/ShareGPT 59.73 -> 62.05",
        ),
        Claim(
            id="switch-matters",
            sentence="The same tuned model answers from the passage more often with [IND] than without.",
            metric="contained",
            arm="indicator",
            baseline="indicator_off",
            direction="higher",
            paper="not reported",
        ),
    ),
)
