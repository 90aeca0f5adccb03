"""`LTXVideoCondition`, at the path that diffusers' documentation imports it from."""

from kadr.diffusers.condition import LTXConditionPipeline, LTXVideoCondition

__all__ = ["LTXConditionPipeline", "LTXVideoCondition"]
