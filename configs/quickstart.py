"""tmp."""
from dmq_jax.config import base, student
def get_config():
    config = base()
    config.sample.num_images = 200
    config.calibrate.num_images = 32
    ft = dict(num_iterations=0)
    config.students = dict(
      rtn_static=student(quant=dict(per_timestep=False)),
      rtn=student(),
      efficientdm=student('efficientdm', finetune=dict(num_iterations=50)))
    return config
