#!/usr/bin/env bash
# hydra-core 1.3.8: a sweeper that Plugins.register() accepted and discover() lists is refused when a sweep starts.
#
# Guess before: register() is the door for an application's own sweeper, wherever its class lives. Seen: the class is
# judged by its module's name when it is made, long after it was accepted; unless that begins with `hydra_plugins.` the
# sweep ends with RuntimeError. The same class under such a name (here a module made at run time) works.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet hydra-core==1.3.8 omegaconf==2.3.1
cat > "$folder/app.py" <<'PYTHON'
import sys
from types import ModuleType

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper


class Counting(Sweeper):
    def setup(self, *, hydra_context, task_function, config):
        pass

    def sweep(self, arguments):
        print("the sweeper ran")
        return []


home = sys.argv.pop(1)
package, module = ModuleType(home.partition(".")[0]), ModuleType(home)
package.__path__ = []
module.Counting, Counting.__module__ = Counting, home
sys.modules |= {package.__name__: package, home: module}
Plugins.instance().register(Counting)
print(f"{home}: registered, discovered: {Counting in Plugins.instance().discover(Sweeper)}")
ConfigStore.instance().store(group="hydra/sweeper", name="counting", node={"_target_": f"{home}.Counting"})
ConfigStore.instance().store(name="config", node={"x": 1})


@hydra.main(version_base="1.3", config_path=None, config_name="config")
def main(config):
    pass


try:
    main()
except RuntimeError as error:
    print(f"{home}: {error}")
PYTHON
cd "$folder"
export HYDRA_FULL_ERROR=1
seen=$(for home in lab.sweeps hydra_plugins.lab; do
  "$folder/venv/bin/python" app.py "$home" -m hydra/sweeper=counting x=1,2
done)
echo "$seen"
expected="lab.sweeps: registered, discovered: True
lab.sweeps: Invalid plugin 'lab.sweeps.Counting': not the hydra_plugins package
hydra_plugins.lab: registered, discovered: True
the sweeper ran"
[ "$seen" = "$expected" ] || { echo "changed" >&2; exit 1; }
