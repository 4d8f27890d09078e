use super::*;
use std::fs;

fn load(text: &str) -> (tempfile::TempDir, Result<RunConfig>) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("run.toml");
    fs::write(&path, text).unwrap();
    let config = RunConfig::load_any(Some(&path), &[]);
    (dir, config)
}

fn set(key: &str, text: &str, origin: &str) -> Override {
    Override::new(key, text, origin)
}

fn problems(result: Result<RunConfig>) -> Vec<ConfigError> {
    match result {
        Err(Error::Config(problems)) => problems,
        other => panic!("expected configuration problems, got {other:?}"),
    }
}

#[test]
fn defaults_are_the_contracts() {
    let config = RunConfig::load_any(None, &[]).unwrap();
    assert_eq!(config, RunConfig::default());
    assert_eq!(config.attack.epsilon, 8.0 / 255.0);
    assert_eq!((config.attack.num_steps, config.attack.num_restarts), (10, 1));
    assert_eq!((config.certify.n0, config.certify.n, config.certify.alpha), (100, 1000, 0.001));
    assert_eq!(config.attack.resolved_step_size(), 2.5 * (8.0 / 255.0) / 10.0);
}

#[test]
fn a_derived_step_never_exceeds_the_budget_and_is_read_back() {
    for (method, steps, length, count) in [
        ("pgd", "1", 1.0, 1),
        ("pgd", "5", 0.5, 5),
        ("fgsm", "5", 1.0, 1),
        ("noise", "5", 0.5, 0),
        ("apgd", "5", 2.0, 5),
    ] {
        let overrides = [set("attack.num_steps", steps, "--set"), set("attack.method", method, "--set")];
        let config = RunConfig::load(Command::Attack, None, &overrides).unwrap();
        let epsilon = config.attack.epsilon;
        assert!((config.attack.resolved_step_size() - length * epsilon).abs() < 1e-15, "{method} {steps}");
        assert_eq!(config.attack.resolved_num_steps(), count, "{method} {steps}");
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.toml");
        fs::write(&path, config.to_toml(Command::Attack).unwrap()).unwrap();
        RunConfig::load(Command::Attack, Some(&path), &[]).unwrap();
    }
}

#[test]
fn later_layers_win_over_earlier_ones() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("run.toml");
    fs::write(&path, "seed = 1\n[attack]\nepsilon = \"4/255\"\nnum_steps = 20\nnorm = \"l2\"\n").unwrap();
    let overrides = [
        set("attack.num_steps", "30", "--set"),
        set("attack.num_steps", "40", "--num-steps"),
        set("model", "123", "--model"),
        set("data.shard", "1/3", "SAFEMED_SHARD"),
    ];
    let config = RunConfig::load_any(Some(&path), &overrides).unwrap();
    assert_eq!(config.seed, 1);
    assert_eq!(config.attack.epsilon, 4.0 / 255.0);
    assert_eq!(config.attack.num_steps, 40);
    assert_eq!(config.attack.norm, NormName::L2);
    assert_eq!(config.model.as_deref(), Some("123"));
    assert_eq!(config.data.shard, Some(Shard { index: 1, count: 3 }));
}

#[test]
fn a_weak_override_gives_way_to_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("run.toml");
    fs::write(&path, "[data]\nomnimedvqa = \"a\"\n").unwrap();
    let weak = [Override { weak: true, ..set("data.omnimedvqa", "b", "--omnimedvqa") }];
    let root = |file| RunConfig::load_any(file, &weak).unwrap().data.omnimedvqa;
    assert_eq!(root(Some(&*path)), Some(PathBuf::from("a")));
    assert_eq!(root(None), Some(PathBuf::from("b")));
}

#[test]
fn a_misspelt_key_is_reported_with_its_place_and_its_near_miss() {
    let (dir, config) = load("seed = 0\n\n[train.adversary]\n  num_stepz = 10\n");
    let problems = problems(config);
    assert_eq!(
        problems[0].to_string(),
        format!(
            "unknown key `num_stepz`\n  --> {}:4:3  (train.adversary.num_stepz)\n   |    num_stepz = 10\n   = help: did you mean `num_steps`?",
            dir.path().join("run.toml").display()
        )
    );
    assert_eq!(problems.len(), 1);
}

#[test]
fn all_problems_come_at_once() {
    let (_dir, config) = load(
        "sead = 1\ndtype = \"f23\"\n[attack]\nnum_steps = \"ten\"\nepsilon = 1.5\nstep_size = 9.0\n[certify]\nalpha = 1.0\nn0 = -1\n[train.grpo]\ngroup_size = 1\n[modle]\nx = 1\n",
    );
    let found: Vec<String> = problems(config).into_iter().map(|problem| problem.key).collect();
    for key in [
        "sead",
        "dtype",
        "attack.num_steps",
        "attack.epsilon",
        "certify.alpha",
        "certify.n0",
        "train.grpo.group_size",
        "modle",
    ] {
        assert!(found.iter().any(|other| other == key), "{key} is missing from {found:?}");
    }
}

#[test]
fn a_key_in_the_wrong_section_is_told_where_it_belongs() {
    let problems = problems(RunConfig::load_any(None, &[set("sigma", "0.25", "--set")]));
    assert_eq!(problems[0].help.as_deref(), Some("did you mean `certify.sigma`?"));
    assert_eq!(problems[0].source_line.as_deref(), Some("--set sigma=0.25"));
}

#[test]
fn a_flags_mistake_names_the_flag() {
    let problems = problems(RunConfig::load_any(None, &[set("attack.norm", "l3", "--norm")]));
    assert_eq!(problems[0].source_line.as_deref(), Some("--norm l3"));
    assert!(problems[0].to_string().contains("unknown word `l3`"), "{}", problems[0]);
    assert!(problems[0].help.as_deref().unwrap().contains("l2"));
}

#[test]
fn numbers_out_of_range_say_the_range_and_the_reason() {
    let cases = [
        ("[attack]\nepsilon = 8", "attack.epsilon", "at most 1 for norm `linf`", "8/255"),
        ("[attack]\nepsilon = -0.1", "attack.epsilon", "out of range: at least 0", ""),
        ("[attack]\nepsilon = \"1/0\"", "attack.epsilon", "expected a number or a fraction", ""),
        ("[attack]\nepsilon = nan", "attack.epsilon", "out of range", ""),
        ("[attack]\nstep_size = \"20/255\"", "attack.step_size", "exceeds 2 x `epsilon`", "leaves the ball"),
        ("[certify]\nsigma = 0", "certify.sigma", "out of range: above 0", ""),
        ("[certify]\ntarget_radius = 0.5", "certify.target_radius", "no effect", "sequential"),
        ("[data]\nshard = \"4/4\"", "data.shard", "does not exist", ""),
        ("device = \"gpu\"", "device", "unknown device `gpu`", ""),
        ("[train]\nwarmup_steps = 2000", "train.warmup_steps", "exceeds `num_steps` 1000", "peak"),
        (
            "prompt = \"med_r1_thnk\"",
            "prompt",
            "unknown prompt `med_r1_thnk`",
            "did you mean `med_r1_think`?",
        ),
        ("seed = 1.5", "seed", "expected a whole number of at least 0, found the number 1.5", ""),
        ("attack = 3", "attack", "is a section, found the whole number 3", "[attack]"),
    ];
    for (text, key, message, help) in cases {
        let (_dir, config) = load(text);
        let problems = problems(config);
        assert_eq!(problems.len(), 1, "{text}: {problems:?}");
        assert_eq!(problems[0].key, key, "{text}");
        assert!(problems[0].message.contains(message), "{text}: {}", problems[0].message);
        assert!(problems[0].help.as_deref().unwrap_or_default().contains(help), "{text}: {:?}", problems[0]);
        assert!(problems[0].position.is_some(), "{text}");
    }
}

#[test]
fn broken_toml_is_located() {
    let (_dir, config) = load("seed = 1\nmodel = \"unclosed\ndtype = \"f32\"\n");
    let problems = problems(config);
    assert_eq!(problems[0].position.map(|position| position.0), Some(2), "{problems:?}");
}

#[test]
fn certify_requires_sigma_and_only_certify_does() {
    let found = problems(RunConfig::load(Command::Certify, None, &[]));
    assert!(found[0].help.as_deref().unwrap().contains("--sigma 0.25"));
    assert!(RunConfig::load(Command::Attack, None, &[]).is_ok());
}

#[test]
fn the_resolved_configuration_loads_again_as_itself() {
    let overrides = [
        set("attack.epsilon", "4/255", "--epsilon"),
        set("certify.sigma", "0.25", "--sigma"),
        set("data.omnimedvqa", "a b/c", "--omnimedvqa"),
        set("train.recipe", "at_grpo", "--set"),
        set("device", "cuda:1", "--device"),
    ];
    for command in [Command::Eval, Command::Attack, Command::Certify, Command::Train] {
        let config = RunConfig::load(command, None, &overrides).unwrap();
        let text = config.to_toml(command).unwrap();
        let (_dir, again) = load(&text);
        assert_eq!(again.unwrap().to_toml(command).unwrap(), text, "{text}");
        assert_eq!(text.contains("[attack]"), command == Command::Attack);
        assert_eq!(text.contains("[train.adversary]"), command == Command::Train);
    }
    let attack = RunConfig::load(Command::Attack, None, &overrides).unwrap();
    assert!(attack.to_toml(Command::Attack).unwrap().contains("step_size = 0.00392"));
}

#[test]
fn every_section_of_training_is_written_down_by_some_recipe() {
    let all = toml::Table::try_from(RunConfig::default()).unwrap();
    let train = all["train"].as_table().unwrap();
    let tables = train.iter().filter(|(_, value)| value.is_table()).map(|(key, _)| format!("train.{key}"));
    let mut config = RunConfig::default();
    let mut written: Vec<&str> = Vec::new();
    for word in RecipeName::WORDS {
        config.train.recipe = word.parse().unwrap();
        written.extend(config.sections(Command::Train));
    }
    let missing: Vec<String> = tables.filter(|table| !written.contains(&table.as_str())).collect();
    assert!(missing.is_empty(), "{missing:?}");
    config.train.recipe = RecipeName::Denoiser;
    config.train.denoiser.width = 7;
    assert!(config.to_toml(Command::Train).unwrap().contains("width = 7"));
}

#[test]
fn identity_ignores_what_changes_no_result_and_nothing_else() {
    let base = RunConfig::default();
    let identity = base.identity(Command::Attack).unwrap();
    let revision = Some("v1".to_owned());
    let same = RunConfig {
        threads: Some(3),
        batch_size: 77,
        images: false,
        revision,
        feature_cache_mib: 0,
        ..base.clone()
    };
    assert_eq!(same.identity(Command::Attack).unwrap(), identity);
    let other = RunConfig { seed: 1, ..base.clone() };
    assert_ne!(other.identity(Command::Attack).unwrap(), identity);
    let mut other = base.clone();
    other.certify.n = 5;
    assert_eq!(other.identity(Command::Attack).unwrap(), identity, "certify settings are not the attack's");
}

#[test]
fn the_schema_describes_every_key_with_its_default_and_range() {
    let schema = RunConfig::schema();
    let epsilon = &schema["properties"]["attack"]["properties"]["epsilon"];
    assert_eq!(epsilon["default"], 8.0 / 255.0);
    assert_eq!(epsilon["minimum"], 0.0);
    assert!(epsilon["description"].as_str().unwrap().contains("Madry"));
    assert_eq!(schema["properties"]["attack"]["properties"]["norm"]["enum"][1], "l2");
    assert_eq!(schema["properties"]["train"]["properties"]["grpo"]["additionalProperties"], false);
}

#[test]
fn a_configuration_shown_loads_as_itself() {
    let overrides = [set("attack.epsilon", "4/255", "--set"), set("model", "a \"b\"", "--model")];
    let config = RunConfig::load_any(None, &overrides).unwrap();
    let (_dir, again) = load(&show(&config).unwrap());
    assert_eq!(again.unwrap(), config);
}
