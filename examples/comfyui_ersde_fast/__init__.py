"""Copy this folder into ComfyUI/custom_nodes: it adds the sampler er_sde_fast and the node SamplerER_SDE (fast)."""

from ersde_fast.integrations.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
