"""Stage speakers: every voice of the model (paper, sec. 3.3)."""

from minomni.train.stages.speech import THINKER, SpeechStage


class SpeakersStage(SpeechStage):
    name, needs = "speakers", ("codec", *THINKER, "talker", "dpo")
    about = "speaker tuning: all voices once more, at a low rate"
