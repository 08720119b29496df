"""Stage speakers: speaker tuning of the Talker on all voices (paper, sec. 3.3)."""

from minomni.train.stages.speech import THINKER, SpeechStage


class SpeakersStage(SpeechStage):
    """Next-code loss on all voices once more, after DPO."""

    name = "speakers"
    needs = ("codec", *THINKER, "talker", "dpo")
    description = "speaker tuning: all voices once more, at a low learning rate"
