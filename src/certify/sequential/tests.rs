use super::*;
use crate::certify::SmoothingConfig;
use crate::rng;
use rand::Rng;
use std::fmt::Write as _;

fn procedure(rule: Rule, target_radius: Option<f64>, n_max: u64, alpha: f64) -> Procedure {
    Procedure::new(Sequential { rule, target_radius, min_gain: 0.05 }, n_max, alpha, 1.0)
}

/// The probability that any look proves `p` although it is the truth: exactly, by walking over all counts at once.
fn false_proofs(procedure: &Procedure, p: Probability, proves: &dyn Fn(u64, u64) -> bool) -> f64 {
    let (mut alive, mut proved) = (vec![1.0], 0.0);
    let (mut next, mut from) = (procedure.next_look(0), 0);
    for n in 1..=procedure.n_max {
        let mut after = vec![0.0; alive.len() + 1];
        for (count, mass) in alive.iter().enumerate() {
            after[count] += mass * p.complement;
            after[count + 1] += mass * p.value;
        }
        alive = after;
        if n == next {
            // The search begins where the last one ended; at the cap a second bound may ask for less.
            while from > 0 && proves(from - 1, n) {
                from -= 1;
            }
            while from <= n && !proves(from, n) {
                from += 1;
            }
            proved += alive.split_off(from.min(n + 1) as usize).iter().sum::<f64>();
            alive.resize(n as usize + 1, 0.0);
            next = procedure.next_look(n);
        }
    }
    proved
}

#[test]
fn a_false_proof_at_any_look_is_as_rare_as_alpha() {
    let mut most = 0f64;
    for rule in [Rule::Kt, Rule::ClopperPearson] {
        for (alpha, n_max) in [(0.001, 3000), (0.05, 1200)] {
            for p in [0.5, 0.69, 0.841, 0.95, 0.99].map(Probability::new) {
                let procedure = procedure(rule, None, n_max, alpha);
                let error = false_proofs(&procedure, p, &|count, n| procedure.proves(count, n, p));
                assert!(error <= alpha, "{rule:?} at {}, alpha {alpha}: {error}", p.value);
                assert!(error > 0.1 * alpha, "{rule:?} at {}, alpha {alpha}: only {error}", p.value);
                most = most.max(error / alpha);
                // The truth below p proves p less often still.
                let lower = Probability::new(p.value - 0.02);
                assert!(false_proofs(&procedure, lower, &|count, n| procedure.proves(count, n, p)) < error);
            }
        }
    }
    assert!(most > 0.7, "the bounds are not wasteful: {most}");
}

#[test]
fn an_anytime_bound_exceeds_the_truth_at_any_look_as_rarely_as_alpha() {
    for rule in [Rule::Kt, Rule::ClopperPearson] {
        for (alpha, p) in [(0.001, 0.5), (0.05, 0.8), (0.05, 0.97)] {
            let (procedure, p) = (procedure(rule, None, 400, alpha), Probability::new(p));
            let above = |count, n| procedure.lower_bound(count, n).unwrap().value > p.value;
            let error = false_proofs(&procedure, p, &above);
            assert!(error <= alpha && error > 0.2 * alpha, "{rule:?} at {}: {error}", p.value);
        }
    }
}

#[test]
fn futility_gives_up_a_certifiable_item_as_rarely_as_alpha() {
    for rule in [Rule::Kt, Rule::ClopperPearson] {
        let p = Probability::new(0.841);
        let procedure = procedure(rule, None, 1000, 0.01);
        let hopeless = |count, n| procedure.proves(count, n, p.opposite());
        let error = false_proofs(&procedure, p.opposite(), &hopeless);
        assert!(error <= 0.01 && error > 0.001, "{rule:?}: {error}");
    }
}

#[test]
fn looks_are_fixed_by_the_cap_alone() {
    let kt = procedure(Rule::Kt, None, 12_345, 0.001);
    let mut looks = vec![kt.next_look(0)];
    while let Some(&last) = looks.last().filter(|last| **last < 12_345) {
        looks.push(kt.next_look(last));
    }
    assert_eq!(looks[..3], [1, 2, 3]);
    assert_eq!(looks[997..1001], [998, 999, 1000, 1010]);
    assert_eq!(looks[looks.len() - 3..], [12_200, 12_300, 12_345]);
    assert!((1..=12_345).all(|n| kt.is_look(n) == looks.contains(&n)));
    let stages = |n_max| procedure(Rule::ClopperPearson, None, n_max, 0.001).stages;
    assert_eq!(stages(1000), [125, 250, 500, 1000]);
    assert_eq!(stages(150), [150]);
    assert_eq!(stages(100_000).len(), 10);
}

/// A walk of Bernoulli draws with probability `p`.
fn walk(procedure: &Procedure, p: f64, seed: u64) -> (u64, Bound, Stop) {
    let mut stream = rng::stream(seed, "walk", &[]);
    let (mut seen, mut count) = (0, 0);
    let run = procedure.run(|n| {
        count += (seen..n).filter(|_| stream.random::<f64>() < p).count() as u64;
        seen = n;
        Ok(count)
    });
    run.unwrap()
}

#[test]
fn clear_items_are_decided_early_and_each_for_its_reason() {
    for rule in [Rule::Kt, Rule::ClopperPearson] {
        let yes_no = procedure(rule, Some(0.5), 20_000, 0.001);
        for (p, reason) in [(0.99, Stop::Certified), (0.3, Stop::Futile), (0.6915, Stop::Cap)] {
            let (n, bound, stop) = walk(&yes_no, p, 1);
            assert_eq!(stop, reason, "{rule:?} at {p}: {n} draws");
            assert!(stop == Stop::Cap || n < 1000, "{rule:?} at {p}: {n} draws");
            let row = yes_no.radius(&bound, stop, 1.0);
            assert_eq!(stop == Stop::Certified, row.radius >= 0.5, "{row:?}");
            assert_eq!(row.abstain, p < 0.5);
        }
        let anytime = procedure(rule, None, 100_000, 0.001);
        for (p, reason) in [(0.99, Stop::Gain), (0.3, Stop::Futile), (1.0, Stop::Gain), (0.5, Stop::Cap)] {
            let (n, bound, stop) = walk(&anytime, p, 2);
            assert_eq!(stop, reason, "{rule:?} at {p}: {n} draws");
            assert!(stop == Stop::Cap || n < 60_000, "{rule:?} at {p}: {n} draws");
            assert!(bound.p_lower.value < p && anytime.radius(&bound, stop, 1.0).abstain == (p <= 0.5));
        }
        // Nothing is too little to gain: on to the cap.
        let greedy = Sequential { rule, target_radius: None, min_gain: 0.0 };
        assert_eq!(walk(&Procedure::new(greedy, 3000, 0.001, 1.0), 1.0, 3).2, Stop::Cap);
    }
}

#[test]
fn an_item_is_left_as_soon_as_unanimous_draws_could_not_save_it() {
    let kt = procedure(Rule::Kt, Some(2.0), 1000, 0.001);
    let least = (0..=1000).find(|&count| kt.proves(count, 1000, kt.target.unwrap())).unwrap();
    assert!(least > 980, "{least}");
    // So many failures among the first draws that not enough successes are left.
    let failures = 1000 - least + 1;
    assert_eq!(kt.hopeless(500 - failures, 500), Some(Stop::Cap));
    assert_eq!(kt.hopeless(501 - failures, 500), None);
}

#[test]
fn what_can_never_be_certified_is_refused_with_what_can() {
    let problem = |rule, target_radius, n, alpha| {
        let sequential = Some(Sequential { rule, target_radius, min_gain: 0.05 });
        let config = SmoothingConfig { n, alpha, sequential, ..SmoothingConfig::new(0.25) };
        config.problems().into_iter().next()
    };
    for rule in [Rule::Kt, Rule::ClopperPearson] {
        for target_radius in [None, Some(0.1), Some(0.5)] {
            let refused = problem(rule, target_radius, 5, 0.001).unwrap();
            assert_eq!(refused.key, if target_radius.is_some() { "target_radius" } else { "n" });
            let help = refused.help.unwrap();
            let least: u64 =
                help.split(|c: char| !c.is_ascii_digit()).find_map(|word| word.parse().ok()).unwrap();
            assert!(problem(rule, target_radius, least, 0.001).is_none(), "{help}");
            assert!(problem(rule, target_radius, least - 1, 0.001).is_some(), "{help}");
        }
        let refused = problem(rule, Some(0.7), 1000, 0.001).unwrap();
        let largest: f64 = refused.message.rsplit(' ').next().unwrap().parse().unwrap();
        assert!(problem(rule, Some(largest), 1000, 0.001).is_none(), "{}", refused.message);
        assert!(problem(rule, Some(largest + 1e-3), 1000, 0.001).is_some(), "{}", refused.message);
        assert!(problem(rule, Some(100.0), 1000, 0.001).unwrap().help.unwrap().starts_with("lower"));
        assert!(problem(rule, Some(0.1), 0, 0.001).is_some());
        for alpha in [0.0, 1.0, f64::NAN] {
            assert_eq!(problem(rule, None, 1000, alpha).unwrap().key, "alpha");
        }
    }
    assert_eq!(problem(Rule::Kt, None, 1000, 0.4).unwrap().key, "alpha");
    assert!(problem(Rule::ClopperPearson, None, 1000, 0.4).is_none());
}

/// The base rates of a Cohen-style file: each row's probability by its printed radius at n = 100,000, and whether it is
/// right; 0.45 for an abstention. `alpha` is the one at which the file inverts.
fn base_rates(text: &str, sigma: f64, alpha: f64) -> Vec<(f64, bool)> {
    text.lines()
        .skip(1)
        .map(|line| {
            let cells: Vec<&str> = line.split('\t').collect();
            if cells[2] == "-1" {
                return (0.45, false);
            }
            // The share whose Clopper-Pearson bound is the printed one; the middle of the counts that print it.
            let format = crate::certify::audit::RadiusFormat::General;
            let counts = crate::certify::audit::counts_printing(cells[3], format, 100_000, alpha, sigma)
                .unwrap()
                .unwrap();
            ((counts.start() + counts.end()) as f64 / 2e5, cells[4] == "1")
        })
        .collect()
}

/// `COHEN=DIR cargo test --release --lib -- --ignored --nocapture draws_of`, with the files under `data/certify` of
/// locuslab/smoothing in DIR, prints the draws that a yes/no question takes. Settings of the published comparison.
#[test]
#[ignore = "a measurement; needs the published files"]
fn draws_of_the_yes_no_question_on_published_images() {
    let dir = std::env::var("COHEN").expect("COHEN names the published files");
    for (file, sigma, alpha, radius) in [
        ("cifar10/resnet110/noise_0.50/test/sigma_0.50", 0.5, 0.01, 0.5),
        ("cifar10/resnet110/noise_0.50/test/sigma_0.50", 0.5, 0.01, 1.0),
        ("imagenet/resnet50/noise_0.50/test/sigma_0.50", 0.5, 0.01, 0.5),
        ("imagenet/resnet50/noise_0.50/test/sigma_0.50", 0.5, 0.01, 1.0),
        ("imagenet/resnet50/noise_0.50/test/sigma_0.50", 0.5, 0.01, 1.5),
        ("imagenet/resnet50/noise_0.25/test/sigma_0.25", 0.25, 0.01, 0.75),
    ] {
        let text = std::fs::read_to_string(std::path::Path::new(&dir).join(file)).unwrap();
        let items = base_rates(&text, sigma, alpha);
        let share = |hits: usize| hits as f64 / items.len() as f64;
        let fixed = share(
            items
                .iter()
                .enumerate()
                .filter(|(i, (p, is_right))| {
                    // The same draws as the walks', all of them.
                    let mut stream = rng::stream(*i as u64, "walk", &[]);
                    let count = (0..100_000).filter(|_| stream.random::<f64>() < *p).count() as u64;
                    *is_right
                        && crate::certify::radius(count, 100_000, 0.001, sigma).unwrap().radius >= radius
                })
                .count(),
        );
        let mut line = format!("{file} r {radius}: fixed {fixed:.3}");
        for rule in [Rule::Kt, Rule::ClopperPearson] {
            let settings = Sequential { rule, target_radius: Some(radius), min_gain: 0.0 };
            let procedure = Procedure::new(settings, 100_000, 0.001, sigma);
            let (mut draws, mut hits, mut stops) = (0, 0, [0; 3]);
            for (i, (p, is_right)) in items.iter().enumerate() {
                let (n, _, stop) = walk(&procedure, *p, i as u64);
                draws += n;
                hits += usize::from(stop == Stop::Certified && *is_right);
                stops[[Stop::Certified, Stop::Futile, Stop::Cap].iter().position(|s| *s == stop).unwrap()] +=
                    1;
            }
            let mean = draws as f64 / items.len() as f64;
            let certified = share(hits);
            let _ =
                write!(line, "; {rule:?} {mean:.0} draws (1/{:.1}), {certified:.3}, {stops:?}", 1e5 / mean);
        }
        eprintln!("{line}");
    }
}
