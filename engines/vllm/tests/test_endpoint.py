"""Whom the HTTP routes let in. Needs fastapi (skipped without), which every vLLM has."""

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

from weightfs_vllm.endpoint import WeightfsEndpoints, authorised


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


if __name__ == "__main__":
    unittest.main()
