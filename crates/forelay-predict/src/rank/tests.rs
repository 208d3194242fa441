//! Tests of the module above.

use forelay_image::{Digest, Extent, PAGE_BYTES, Touch};

use super::*;
use crate::needs::{self, Attachments, Context, Model};
use crate::time::Timestamp;
use crate::working_set::WorkingSets;

fn image(name: &str) -> Digest {
    Digest::of(name.as_bytes())
}

#[test]
fn a_vm_gets_its_components_and_extents_with_reasons() {
    let mut model = Model::new(needs::NeedsConfig::default());
    let mut sets = WorkingSets::default();
    let mut attachments = Attachments::new();
    let context = |i: i64| Context {
        profile: "web".into(),
        owner: "ann".into(),
        at: Timestamp(i * 86_400_000),
        memory_mib: 512,
    };
    for i in 0..42 {
        let attached: &[&str] = if i % 2 == 0 {
            &["debian", "nginx", "redis"]
        } else {
            &["debian", "nginx"]
        };
        model.observe(&context(i), attached.iter().copied());
        if i % 2 == 0 {
            attachments.attached("web", "redis", 120.0);
        }
        let mut touches = vec![Touch {
            image: image("debian"),
            extent: Extent::new(8 * PAGE_BYTES, 4 * PAGE_BYTES),
            first_touch_ms: 40,
        }];
        if i != 7 {
            touches.push(Touch {
                image: image("nginx"),
                extent: Extent::new(0, PAGE_BYTES),
                first_touch_ms: 900,
            });
        }
        sets.observe("web", &[image("debian"), image("nginx")], &touches);
    }
    let locate = |name: &str| {
        Some(Present {
            label: name.to_owned(),
            names: vec![name.to_owned()],
            image: image(name),
            image_bytes: 1 << 20,
        })
    };
    let locked: Vec<Present> = ["debian", "nginx"].map(|n| locate(n).unwrap()).into();
    let upcoming = Subject {
        context: context(42),
        probability: 0.97,
        until_s: 60.0,
        reasons: vec![Why::Launch {
            probability: 0.97,
            reason: "launches every 24 h".into(),
        }],
        present: locked.clone(),
        age_s: None,
    };
    let running = Subject::running(context(42), locked.clone(), 30.0);
    let old = Subject::running(context(42), locked, 3600.0);
    let known = Knowledge {
        needs: &model,
        attachments: &attachments,
        plan: &|profile, images| sets.plan(profile, images).into(),
        horizon_s: 600.0,
        locate: &locate,
    };
    let forecasts = [upcoming, running, old].map(|subject| forecast(&subject, &known));
    let [first, second, third] = &forecasts;
    let names: Vec<&str> = first
        .components
        .iter()
        .map(|c| c.component.as_str())
        .collect();
    assert_eq!(names, ["debian", "nginx", "redis"]);
    assert_eq!(first.probability, 0.97);
    assert_eq!(first.components[0].probability, 1.0, "given the launch");
    let touched = &first.components[0].extents[0];
    assert!(
        touched.probability > 0.97,
        "given the component: {touched:?}"
    );
    assert!((first.components[2].probability - 0.5).abs() < 0.1);
    assert_eq!(first.components[2].reasons.last(), Some(&Why::Untouched));
    let nginx = first
        .components
        .iter()
        .find(|one| one.image == image("nginx"))
        .unwrap();
    let reasons: Vec<String> = nginx.reasons.iter().map(ToString::to_string).collect();
    assert_eq!(
        reasons,
        [
            "launches every 24 h, 0.97",
            "in the profile's lock",
            "touched in 41 of 42 launches"
        ]
    );
    let names: Vec<&str> = second
        .components
        .iter()
        .map(|c| c.component.as_str())
        .collect();
    assert_eq!(names, ["redis"], "what runs there is not forecast again");
    assert!(second.running && second.components[0].attached);
    let words: Vec<String> = second.components[0]
        .reasons
        .iter()
        .map(ToString::to_string)
        .collect();
    assert_eq!(words[0], "runs now");
    assert_eq!(
        words[2],
        "attached to VMs like it 21 times, usually 120 s after their launch"
    );
    assert!((second.components[0].until_s - 90.0).abs() < 1e-9);
    assert!(
        third.components.is_empty(),
        "long past the usual time, nothing is expected"
    );
    assert!(
        serde_json::to_string(&forecasts)
            .unwrap()
            .contains("touched")
    );
}
