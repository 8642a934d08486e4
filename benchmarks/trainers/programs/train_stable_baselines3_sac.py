"""Stable-Baselines3: SAC, with an optimizer each for actor, critic and entropy coefficient."""

import gymnasium as gym
import numpy as np
from stable_baselines3 import SAC


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


model = SAC("MlpPolicy", Follow(), learning_starts=40, policy_kwargs={"net_arch": [32, 32]}, seed=0, device="cpu")
# --- watch here ---
model.learn(total_timesteps=100)
print(model.logger.name_to_value["train/critic_loss"])
