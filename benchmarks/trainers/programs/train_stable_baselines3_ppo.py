"""Stable-Baselines3: PPO on a task without a simulator."""

import gymnasium as gym
import numpy as np
from stable_baselines3 import PPO


class Follow(gym.Env):
    """The reward is high where the action equals the observation."""

    observation_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)
    action_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed, options=options)
        self.steps, self.seen = 0, self.np_random.uniform(-1, 1, 2).astype(np.float32)
        return self.seen, {}

    def step(self, action):
        reward = -float(((action - self.seen) ** 2).sum())
        self.steps, self.seen = self.steps + 1, self.np_random.uniform(-1, 1, 2).astype(np.float32)
        return self.seen, reward, False, self.steps == 32, {}


model = PPO("MlpPolicy", Follow(), n_steps=128, batch_size=64, n_epochs=4, seed=0, device="cpu")
# --- watch here ---
model.learn(total_timesteps=512)
print(model.logger.name_to_value["train/loss"])
