"""Whom the HTTP routes let in, and for how long they hold requests still. Needs fastapi (skipped without), which every vLLM has."""

import asyncio
import os
import sys
import unittest
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))
try:
    import fastapi
except ImportError:
    raise unittest.SkipTest("needs fastapi") from None

from weightfs_vllm.endpoint import WeightfsEndpoints, authorised, pause, resume


class Keys(unittest.TestCase):
    def let_in(self, given, environment, token):
        """Is `token` let in by a server that was started with these keys?"""
        state = SimpleNamespace()
        with mock.patch.dict(os.environ, {} if environment is None else {"VLLM_API_KEY": environment}, clear=True):
            asyncio.run(WeightfsEndpoints().init_state(None, state, SimpleNamespace(api_key=given, model="/m")))
        request = SimpleNamespace(app=SimpleNamespace(state=state), headers={"Authorization": f"Bearer {token}"})
        try:
            authorised(request)
        except fastapi.HTTPException:
            return False
        return True

    def test_given_keys_take_the_place_of_the_environments(self):
        for given in (["new"], "new"):
            self.assertTrue(self.let_in(given, "old", "new"))
            self.assertFalse(self.let_in(given, "old", "old"))
        for none in (None, []):
            self.assertTrue(self.let_in(none, "old", "old"))
            self.assertFalse(self.let_in(none, "old", "new"))
            self.assertTrue(self.let_in(none, None, "anything"))


class Pauses(unittest.TestCase):
    def setUp(self):
        self.engine = mock.AsyncMock()
        self.request = SimpleNamespace(app=SimpleNamespace(state=SimpleNamespace(weightfs_engine=self.engine)))

    def asked(self):
        return [call[0] for call in self.engine.method_calls]

    def test_a_pause_ends_by_itself(self):
        async def scenario():
            for _ in range(2):
                await pause(self.request, 0.01)
                await self.request.app.state.weightfs_lease

        asyncio.run(scenario())
        self.assertEqual(self.asked(), ["pause_generation", "resume_generation"] * 2)

    def test_a_pause_that_is_renewed_lasts_longer_and_is_one(self):
        async def scenario():
            await pause(self.request, 0.01)
            first = self.request.app.state.weightfs_lease
            await pause(self.request, 3600)
            with self.assertRaises(asyncio.CancelledError):
                await first
            self.assertEqual(self.asked(), ["pause_generation"])
            second = self.request.app.state.weightfs_lease
            await resume(self.request)
            with self.assertRaises(asyncio.CancelledError):
                await second
            # The next is a pause of its own.
            await pause(self.request, 3600)

        asyncio.run(scenario())
        self.assertEqual(self.asked(), ["pause_generation", "resume_generation", "pause_generation"])


if __name__ == "__main__":
    unittest.main()
