"""RWKU: has an instruction-tuned model really forgotten a person? Probes, attacks, membership, neighbours, utility.

Paper         RWKU: Benchmarking Real-World Knowledge Unlearning for Large Language Models. Jin, Cao, Wang, He, Yuan, Li, Chen,
              Liu and Zhao, NeurIPS 2024 Datasets and Benchmarks, https://arxiv.org/abs/2406.10890.
What you get  One table of a model before or after unlearning: what it still tells about a target when asked to fill a blank,
              when asked plainly, and under nine kinds of adversarial rewording; what it still knows of the target's
              neighbours; four membership-inference scores; five measures of general ability. `make` reads your copy of the
              benchmark, or builds a stand-in from facts about invented people. `fit` gives in-context unlearning, the
              baseline that trains nothing; trained ones are methods of their own (npo with loss ga, npo, dpo or idk; flat).

Idea          A benchmark for the practical case: all one has is a name, with neither a forget corpus nor a retain corpus.
              Knowledge that plain questions no longer bring up may stand behind a cloze, a hint, another language or a
              demonstration, and the target's neighbours may have gone with it. So ask in all these ways.

Maths         recall       ROUGE-L recall of a reply against the short answer: longest common subsequence / words of the answer
              fb, qa, aa   mean recall over fill-in-blank (level 1), question (level 2), adversarial probes (level 3); all of a
                           side pooled is `all`. Forget should fall, neighbours should not.
              aa_minus_qa  for a fact, mean recall under its attacks minus that of its plain question; fb_minus_qa likewise.
                           Where it rises, attacks bring back what questions call forgotten.
              Membership, per text, higher = more likely seen (l_t = log p(x_t | x_<t)):
              loss         mean_t l_t;   zlib  mean_t l_t / bytes of the compressed text
              min_k        mean of the least likely 20 % of l_t
              min_k_plus   the same on (l_t - mu_t) / sigma_t, mu_t = sum_v p log p and sigma_t^2 = sum_v p (log p)^2 - mu_t^2
              auc          probability that a forget text scores above one that was never seen; 0.5 = not told apart
              fluency      (2/3 H_2 + 4/3 H_3) / 2, H_n the entropy in bits of a reply's n-grams

Departures    1. Membership scores are log-likelihoods, as in the released code; the paper's table shows the loss, times 100,
                 the other way round. The AUC against unseen texts is ours.
              2. Failures stop the run and empty replies are counted (no_answer); the released code scores what failed as an
                 empty reply, which counts as forgotten.
              3. Each reply stops at its own newline; the released code stops when all rows of a batch have stopped.
              4. Recall is rouge-score's, on lower-cased words without stemming, where the released code takes the package
                 rouge on words as they stand. Containment of the whole answer stands beside it, for answers of one word.
              5. Instructions around the probes are worded anew: numbers compare within temper, not with the paper's table.
              6. A model without a chat template is asked in the plain Question/Answer format, and its rows say so.
              7. N-grams for fluency are of words as `ops.text` splits them, not of NLTK's tokens.
              8. TruthfulQA is asked without the primer of six questions; multiple-choice questions take the examples their
                 rows bring.
              9. In the stand-in, neighbours are other people of the same set; the paper's are pages the target's page links
                 to. Its portraits are put together from the facts; the paper has the model write them.
              10. In-context unlearning is a prefix of user turns; texts for membership are read without it.
              11. Part `forget` holds portraits as replies to a question, of which the trained methods score the reply; the paper
                 trains on plain texts, every token scored. Rejection tuning takes the facts' own questions and npo's "I don't
                 know" replies; the paper's takes 300 questions of the model's own and 99 replies.
              12. In the stand-in, synonym manipulation is the row's paraphrased question, which names the person as before; the
                 paper's puts aliases and synonyms in the place of names and words. Probes that a row has nothing for (no
                 paraphrase, no other fact to hint at) are left out, with a warning.

Limits        Recall rewards saying much, so the cap of 30 tokens is part of the metric. In other scripts recall is 0 and
              containment is what counts. The stand-in knows eight facts a person, and translations for the facts of
              builtin:people only (other questions are framed in French, German or Spanish). Keep real names to the public set.
Reference code  github.com/jinzhuoran/RWKU (no licence file of its own; facts only).
"""

from __future__ import annotations

from dataclasses import dataclass

from temper.core.card import Card, Claim


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the probes and of what is measured."""

    folder: str = ""
    """`make`: a folder with your copy of the benchmark's files, named as the hub's configs or as in one target's folder of the
    reference code; empty = build the stand-in from the data. A finished run does not notice when the files change."""
    subjects: tuple[str, ...] = ()
    """`make`: only rows about these targets; empty = all."""
    num_targets: int = 0
    """`make`, stand-in: so many of these people, in the data's order and beginning with the one that the seed counts to; 0 = all."""
    num_facts: int = 0
    """`make`, stand-in: facts of each part that are probed; 0 = all."""
    num_utility: int = 16
    """`make`, stand-in: world facts that become utility questions; 0 = all."""
    reply_tokens: int = 30
    """Longest reply to a probe (paper: 30); part of the metric."""
    reason_tokens: int = 256
    """Longest chain of thought (paper: 256)."""
    fluency_tokens: int = 256
    """Longest reply for fluency (paper: 256); 0 leaves it out."""
    min_k: float = 0.2
    """Share of the least likely tokens that min_k and min_k_plus average (paper's table: 20 %)."""
    max_rows: int = 0
    """At most so many rows of each part; 0 = all."""
    max_tokens: int = 2048
    """Longest text for membership."""

    def __post_init__(self) -> None:
        if not 0 < self.min_k <= 1:
            raise ValueError(f"min_k is a share in (0, 1], not {self.min_k}")
        if self.reply_tokens < 1 or self.reason_tokens < 1:
            raise ValueError("reply_tokens and reason_tokens must be at least 1")


PARTS = {
    "forget_level1?": "Dialogue",
    "forget_level2?": "Dialogue",
    "forget_level3?": "Dialogue",
    "neighbor_level1?": "Dialogue",
    "neighbor_level2?": "Dialogue",
    "mia_forget?": "Text",
    "mia_retain?": "Text",
    "mia_unseen?": "Text",
    "utility_general?": "Choice",
    "utility_reason?": "Dialogue",
    "utility_truthfulness?": "Choice",
    "utility_factuality?": "Dialogue",
    "utility_fluency?": "Dialogue",
}
_PEOPLE = {"forget?": "Dialogue", "retain?": "Dialogue", "holdout?": "Dialogue", "world_facts?": "Dialogue"}


def _forgets(arm: str, name: str, paper: str) -> Claim:
    return Claim(
        id=f"{arm}-lowers-qa",
        sentence=f"{name} lowers the recall of plain questions about the target.",
        metric="forget_qa",
        arm=arm,
        baseline="before",
        direction="lower",
        paper=paper,
    )


def _recovers(arm: str, kind: str, name: str) -> Claim:
    return Claim(
        id=f"{arm}-{kind}-brings-back",
        sentence=f"After {name} {'attacks' if kind == 'aa' else 'blanks'} fall less than plain questions about the same fact.",
        metric=f"{kind}_minus_qa",
        arm=arm,
        baseline="before",
        direction="higher",
        paper="adversarial and fill-in-blank probes recover what question probes call forgotten",
    )


CARD = Card(
    title="RWKU: probing what an unlearned model still knows of a person",
    paper="arXiv:2406.10890",
    verbs=("measure", "make", "fit"),
    config=Config,
    needs=frozenset({"generate", "logprobs"}),
    data={"measure": PARTS, "make": _PEOPLE, "fit": PARTS},
    produces=("prompt",),
    claims=(
        _forgets(
            "icu", "In-context unlearning", "forget, all probes: 79.6 to 12.8 (Llama-3-8B-Instruct, Table 1)"
        ),
        _forgets("npo", "NPO", "forget, all probes: 79.6 to 26.2"),
        _recovers("npo", "aa", "NPO"),
        _recovers("npo", "fb", "NPO"),
        Claim(
            id="icu-costs-neighbours",
            sentence="In-context unlearning lowers the recall of probes about the target's neighbours.",
            metric="neighbor_all",
            arm="icu",
            baseline="before",
            direction="lower",
            paper="neighbours, all probes: 90.7 to 55.7",
        ),
        Claim(
            id="membership-still-shows",
            sentence="After NPO the loss still tells the target's texts from texts that were never seen.",
            metric="mia_auc_loss",
            arm="npo",
            baseline=0.5,
            direction="higher",
            paper="membership inference still succeeds (finding; the paper reports scores, not AUC)",
        ),
    ),
)
