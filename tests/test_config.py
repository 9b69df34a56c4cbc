"""Laws of dmq_jax/config/."""

import dataclasses
import json
import re
import typing

import ml_collections
import pytest

from dmq_jax import config as config_lib
from dmq_jax.config import (
    AdaptConfig,
    CalibrateConfig,
    Config,
    DataConfig,
    EfficientDMConfig,
    EvaluateConfig,
    FinetuneConfig,
    MeshConfig,
    QuantConfig,
    ReconstructConfig,
    RoundToNearestConfig,
    RuleConfig,
    SampleConfig,
    SamplerConfig,
    StudentConfig,
    TeacherConfig,
    TuneQDMConfig,
    base,
    from_config_dict,
    student,
    to_dict,
)


def rich_config() -> Config:
    """A run that uses every kind of field."""
    rules = RuleConfig(pattern='conv_(in|out)', weight_bits=8), RuleConfig(pattern='.*')
    return Config(
        seed=3,
        students={
            'nearest': StudentConfig(),
            'w4a4': StudentConfig(
                method=EfficientDMConfig(lora_rank=8),
                quant=QuantConfig(coverage='rules', rules=rules, weight_group_size=64),
                finetune=FinetuneConfig(num_iterations=10),
            ),
        },
    )


def test_the_base_is_the_defaults():
    assert from_config_dict(base()) == Config()


def test_an_empty_mapping_is_the_defaults():
    assert from_config_dict({}) == Config()


@pytest.mark.parametrize('wrap', [dict, ml_collections.ConfigDict, lambda d: json.dumps(d)])
def test_a_config_survives_the_round_trip(wrap):
    mapping = wrap(to_dict(rich_config()))
    mapping = json.loads(mapping) if isinstance(mapping, str) else mapping
    assert from_config_dict(mapping) == rich_config()


def test_the_description_is_json_of_every_field():
    assert from_config_dict(json.loads(config_lib.describe(rich_config()))) == rich_config()


def test_a_student_subtree_holds_every_option_of_its_method():
    tree = student('efficientdm', quant={'weight_bits': 8})
    assert tree.method.lora_rank == EfficientDMConfig().lora_rank
    assert tree.finetune.num_iterations == 0
    assert tree.quant.weight_bits == 8


def test_a_locked_student_takes_overrides_of_options_the_file_never_set():
    tree = base()
    tree.students.w4 = student('efficientdm')
    tree.lock()
    tree.students.w4.finetune.num_iterations = 10
    tree.students.w4.quant.weight_group_size = 32
    config = from_config_dict(tree)
    assert config.students['w4'].finetune.num_iterations == 10
    assert config.students['w4'].quant.weight_group_size == 32


def test_the_method_is_chosen_by_its_name():
    methods = {'a': {'method': {'name': 'round_to_nearest'}}, 'b': student('efficientdm')}
    students = from_config_dict({'students': methods}).students
    assert isinstance(students['a'].method, RoundToNearestConfig)
    assert isinstance(students['b'].method, EfficientDMConfig)


def test_rules_may_be_dataclasses_inside_a_config_dict():
    tree = base()
    tree.students.w4 = student(quant={'rules': (RuleConfig(pattern='.*', weight_bits=8),)})
    assert from_config_dict(tree).students['w4'].quant.rules[0].weight_bits == 8


def test_an_int_is_accepted_for_a_float_and_becomes_one():
    eta = from_config_dict({'sampler': {'eta': 1}}).sampler.eta
    assert isinstance(eta, float) and eta == 1.0


def test_lists_become_tuples():
    assert from_config_dict({'report': {'layers': ['a', 'b']}}).report.layers == ('a', 'b')


@pytest.mark.parametrize(
    'mapping, text',
    [
        ({'sed': 1}, "Config has no field 'sed'; did you mean 'seed'?"),
        (
            {'students': {'a': {'finetune': {'num_iteration': 1}}}},
            "FinetuneConfig has no field 'num_iteration'; did you mean 'num_iterations'? "
            '(at config.students.a.finetune)',
        ),
        (
            {'students': {'a': {'method': {'name': 'efficientdm', 'lora_rnk': 4}}}},
            "EfficientDMConfig has no field 'lora_rnk'; did you mean 'lora_rank'?",
        ),
        ({'mesh': {'zzz': 1}}, "MeshConfig has no field 'zzz'; it has data, fsdp, tensor."),
        ({'seed': 1.5}, 'config.seed=1.5: expected int, got float'),
        ({'seed': True}, 'config.seed=True: expected int, got bool'),
        ({'sampler': {'eta': True}}, 'config.sampler.eta=True: expected float, got bool'),
        ({'sampler': {'eta': 'a'}}, "config.sampler.eta='a': expected float, got str"),
        ({'sampler': {'name': 'dim'}}, "config.sampler.name='dim': expected one of 'ddim'"),
        ({'sampler': {'name': 3}}, 'config.sampler.name=3: expected str, got int'),
        ({'report': {'layers': 'mid'}}, "config.report.layers='mid': expected a list"),
        ({'report': {'layers': [1]}}, 'config.report.layers[0]=1: expected str'),
        ({'teacher': 3}, 'config.teacher=3: expected the options of TeacherConfig'),
        ({'students': {'a': {'method': 'x'}}}, "config.students.a.method='x': expected a dict"),
        (
            {'students': {'a': {'method': {'name': 'eficientdm'}}}},
            'expected one of round_to_nearest, efficientdm, full_finetuning, lsq, ptqd, '
            'qdiffusion, qlora, repq_vit, svdquant, tcaq_dm, tfmq_dm, tuneqdm; '
            "did you mean 'efficientdm'?",
        ),
        (
            {'students': {'a': {'quant': {'rules': [{'weight_bits': 4}]}}}},
            'config.students.a.quant.rules[0] lacks pattern',
        ),
        (
            {'students': {'a': {'quant': {'weight_bits': 9}}}},
            'config.students.a.quant.weight_bits=9: expected 2..8, or 32',
        ),
        ({'students': {'a-b': {}}}, "the name 'a-b'"),
        ({'students': {'teacher': {}}}, "not 'teacher'"),
    ],
)
def test_a_mistake_is_named_with_its_place_and_its_cure(mapping, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        from_config_dict(mapping)


def test_a_student_with_a_misspelt_option_is_refused_where_it_is_written():
    with pytest.raises(ValueError, match="did you mean 'quant'"):
        student(qant={'weight_bits': 8})


@pytest.mark.parametrize(
    'make, text',
    [
        (lambda: SamplerConfig(num_steps=0), 'num_steps=0'),
        (lambda: SamplerConfig(eta=1.5), 'eta=1.5'),
        (lambda: SamplerConfig(name='ddpm', eta=1.0), 'only ddim has an eta'),
        (lambda: SamplerConfig(guidance_scale=float('nan')), 'guidance_scale=nan'),
        (lambda: SamplerConfig(name='heun'), "name='heun': expected one of 'ddim', 'ddpm'"),
        (lambda: SamplerConfig(name='pndm', num_steps=3), 'expected at least 4'),
        (lambda: SamplerConfig(name='plms', num_steps=1), 'expected at least 2'),
        (lambda: SamplerConfig(steps_offset=1), 'only leading and dpm_leading have an offset'),
        (lambda: SamplerConfig(sections=(10, 10)), "expected (), or spacing='adm'"),
        (lambda: SamplerConfig(spacing='adm', sections=(5, 6)), 'of sum num_steps=20'),
        (lambda: SamplerConfig(spacing='karras'), 'only dpm_solver and euler go by the level'),
        (lambda: SamplerConfig(variance='fixed_large'), 'only ddpm has a choice'),
        (lambda: SamplerConfig(clip_sample=0.0), 'clip_sample=0.0: expected None or'),
        (lambda: SamplerConfig(final_alpha='zero'), "final_alpha='zero': expected one of"),
        (lambda: SamplerConfig(final_order='first'), 'only dpm_solver has a choice'),
        (lambda: CalibrateConfig(num_images=48), 'num_images=48: expected a multiple'),
        (lambda: CalibrateConfig(num_images=0), 'num_images=0'),
        (lambda: QuantConfig(activation_bits=1), 'activation_bits=1: expected 2..8'),
        (lambda: QuantConfig(percentile=5.0), 'percentile=5.0'),
        (lambda: QuantConfig(weight_group_size=0), 'weight_group_size=0'),
        (lambda: QuantConfig(coverage='rules'), 'list the rules'),
        (lambda: RuleConfig(pattern='('), 'not a regular expression'),
        (lambda: RuleConfig(pattern='a', weight_bits=16), 'weight_bits=16'),
        (lambda: EfficientDMConfig(lora_rank=0), 'lora_rank=0'),
        (lambda: FinetuneConfig(batch_size=0), 'batch_size=0'),
        (lambda: StudentConfig(finetune=FinetuneConfig(num_iterations=5)), 'learns nothing'),
        (
            lambda: StudentConfig(adapt=AdaptConfig(num_iterations=5)),
            "adapt.num_iterations=5: the method 'round_to_nearest' learns nothing",
        ),
        (
            lambda: StudentConfig(
                method=EfficientDMConfig(), reconstruct=ReconstructConfig(num_iterations=5)
            ),
            "reconstruct.num_iterations=5: the method 'efficientdm' does not learn block by block",
        ),
        (
            lambda: StudentConfig(method=EfficientDMConfig(), adapt=AdaptConfig(num_iterations=5)),
            "compares features of the teacher, which images have none of, unless loss='output'",
        ),
        (
            lambda: Config(
                students={
                    's': StudentConfig(method=TuneQDMConfig(), adapt=AdaptConfig(num_iterations=5))
                }
            ),
            "students.s.adapt.num_iterations=5 with data.path='': expected images",
        ),
        (lambda: DataConfig(class_path='a'), "class_path='a' with path='': expected data.path"),
        (lambda: DataConfig(path='a', class_prompt='b'), "with class_path='': expected data.class"),
        (lambda: DataConfig(fit='stretch'), "fit='stretch': expected one of 'crop', 'pad'"),
        (lambda: EvaluateConfig(reference=''), "reference=''"),
        (lambda: TeacherConfig(num_classes=0), 'num_classes=0'),
        (lambda: MeshConfig(data=0), 'data=0'),
        (lambda: MeshConfig(fsdp=-1), 'only one may be -1'),
        (lambda: Config(seed=-1), 'seed=-1'),
    ],
)
def test_values_that_make_no_sense_are_refused(make, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        make()


def test_a_choice_is_also_checked_when_the_config_is_made_in_python():
    # A type checker that instruments the package raises a TypeError before ours.
    with pytest.raises((ValueError, TypeError), match="mode='int'|'mode'"):
        SampleConfig(mode='int')


@pytest.mark.parametrize('bits', [2, 8, 32])
def test_every_documented_width_is_accepted(bits):
    assert QuantConfig(weight_bits=bits).weight_bits == bits


def test_another_schema_is_read_by_the_same_rules():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Other:
        rate: float = 1.0

    assert from_config_dict(base(Other), Other) == Other()
    with pytest.raises(ValueError, match="Other has no field 'rat'; did you mean 'rate'"):
        from_config_dict({'rat': 1.0}, Other)


@pytest.mark.parametrize('name', config_lib.RECIPES)
def test_a_recipe_is_a_method_with_options_of_its_own(name):
    options = config_lib.RECIPES[name]
    found = config_lib.student(name).method
    assert {key: found[key] for key in options} == dict(options)
    assert found.to_dict() != config_lib.student(options['name']).method.to_dict()


def test_every_method_says_by_which_stage_it_learns():
    options = typing.get_args(config_lib.MethodConfig)
    assert set(config_lib.LEARNS_BY) == {option().name for option in options}


@pytest.mark.parametrize('name', [*config_lib.LEARNS_BY, *config_lib.RECIPES])
def test_quick_options_make_a_student_that_learns_by_its_own_stage_alone(name):
    options = config_lib.quick(name)
    stage = config_lib.LEARNS_BY[options['method']['name']]
    assert set(options) == {'method'} | ({stage} if stage else set())
    found = from_config_dict(student(**options), StudentConfig)
    for each in ('reconstruct', 'finetune', 'adapt'):
        assert (getattr(found, each).num_iterations > 0) == (each == stage)


def test_one_call_sets_the_samplers_of_images_calibration_and_all_learning():
    mapping = config_lib.base()
    mapping.students = {'a': config_lib.student('efficientdm'), 'b': config_lib.student()}
    mapping.students.a.finetune.sampler.num_steps = 100
    config = config_lib.from_config_dict(config_lib.with_sampler(mapping, eta=1))
    learning = [
        part.sampler for s in config.students.values() for part in (s.finetune, s.reconstruct)
    ]
    samplers = [config.sampler, config.calibrate.sampler, *learning]
    assert [sampler.eta for sampler in samplers] == [1.0] * 6
    assert [sampler.num_steps for sampler in samplers] == [20, 20, 100, 20, 20, 20]


@pytest.mark.parametrize(
    ('options', 'text'),
    [
        ({'etta': 1.0}, "did you mean 'eta'"),
        ({'eta': 2.0}, 'expected 0..1'),
        ({'eta': 'x'}, 'float'),
    ],
)
def test_a_sampler_that_makes_no_sense_is_refused_where_it_is_set(options, text):
    with pytest.raises(ValueError, match=text):
        config_lib.with_sampler(config_lib.base(), **options)


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().seed = 1
