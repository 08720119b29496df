"""5. Makes a model: the world it learns from, the losses, one loop, the stages."""
