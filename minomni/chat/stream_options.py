"""Checked options of one streamed reply."""

from dataclasses import dataclass

from minomni.arguments import check_seed
from minomni.chat.generation_options import sampling_configs
from minomni.config import FlowConfig, OmniConfig, SamplingConfig
from minomni.errors import UserError, quote
from minomni.token2wav.ode_solver import with_euler
from minomni.token2wav.streaming import Schedule

LOW_LATENCY = "low_latency"  # stands for the model's low_latency_schedule()


@dataclass(frozen=True)
class StreamOptions:
    """How a reply is generated and how its audio is split."""

    sampling: tuple[SamplingConfig, SamplingConfig]  # of Thinker and Talker
    seed: int
    schedule: Schedule | str | None  # LOW_LATENCY, or None for all audio at the end
    flow: FlowConfig


def stream_options(
    config: OmniConfig,
    seed: object,
    schedule: Schedule | str | None,
    flow: FlowConfig | None,
    options: dict,
) -> StreamOptions:
    """Check the arguments of omni.stream(). flow: None for the model's, with Euler steps where the
    audio is split. Raises UserError.
    """
    sampling = sampling_configs(config, options)
    checked_seed = check_seed(seed)
    if schedule not in (None, LOW_LATENCY) and not isinstance(schedule, Schedule):
        raise UserError(
            f'schedule {quote(schedule)}; give "{LOW_LATENCY}", a Schedule, or None for all audio '
            f"at the end"
        )
    if flow is None:
        flow = config.flow if schedule is None else with_euler(config.flow)
    if not isinstance(flow, FlowConfig):  # which checks its own values
        raise UserError(
            f"flow is {quote(flow)}; expected a FlowConfig, such as "
            f"dataclasses.replace(omni.config.flow, points=4)"
        )
    return StreamOptions(sampling, checked_seed, schedule, flow)
