"""READ for ms-swift: registers the method in its `tuners_map`.

swift sft --external_plugins examples/swift_plugin.py --tuner_type read --model ... --dataset ...
"""

from peft import get_peft_model
from swift.tuner_plugin import PeftTuner, tuners_map

from peft_read import READConfig


class READTuner(PeftTuner):
    @staticmethod
    def prepare_model(args, model):
        return get_peft_model(model, READConfig(r=8, task_type="CAUSAL_LM"))


tuners_map["read"] = READTuner
