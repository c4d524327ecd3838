"""Reinforcement learning from verified rewards: rollouts, advantages, the difficulty curriculum, batches for the step."""
