"""FlashMoE inside other systems. Nothing here is imported by the rest of the package."""
