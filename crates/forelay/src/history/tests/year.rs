//! What a year takes.

use super::*;

/// A year of 10,000 profiles, from the real size of a year of twenty of them: twenty launches a
/// day each (200,000 a day on the host), four images with scattered working sets. Touches are
/// appended once a day, as a working set does not grow with their number, but for every launch of
/// the last day, when they are there in raw form.
#[tokio::test]
async fn a_year_of_ten_thousand_profiles_fits_in_a_gibibyte() {
    const PROFILES: u64 = 20;
    let scratch = Scratch::new();
    let history = scratch.open().await;
    let mut seed = 1_u64;
    let mut random = move |below: u64| {
        seed = seed
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) % below
    };
    let images: Vec<ComponentRef> = (0..40).map(|i| component(&format!("c{i}"))).collect();
    for day in 0..365_u64 {
        let mut events = Vec::new();
        for profile in 0..PROFILES {
            let name = format!("profile-{profile}");
            let mine = [0, 1, 2, 3].map(|i| &images[((profile * 7 + i * 11) % 40) as usize]);
            for launch in 0..20_u64 {
                let at = day as i64 * DAY_MS + random(DAY_MS as u64) as i64;
                let nonce = random(1 << 50) * 100;
                let components = mine.iter().map(|c| (*c).clone()).collect();
                let mut add = |i, what| events.push(event(at, nonce + i, &name, what));
                add(
                    0,
                    What::Launch {
                        components,
                        count: 1,
                    },
                );
                add(
                    1,
                    What::Stop {
                        ran_ms: random(600_000),
                    },
                );
                add(
                    2,
                    What::Sample(ResourceSample {
                        cpu_ms: random(60_000),
                        memory_bytes: (200 << 20) + random(300 << 20),
                        read_bytes: random(1 << 30),
                        ..ResourceSample::default()
                    }),
                );
                if launch == 0 || day == 364 {
                    let images: Vec<Digest> = mine.iter().map(|c| c.image).collect();
                    let touches = (0..200)
                        .map(|i| {
                            let page = (i * 37 + profile) * 16 + random(3);
                            Touch {
                                image: images[i as usize % 4],
                                extent: Extent::new(
                                    page * PAGE_BYTES,
                                    (1 + random(8)) * PAGE_BYTES,
                                ),
                                first_touch_ms: random(4000) as u32,
                            }
                        })
                        .collect();
                    add(3, What::Touched { images, touches });
                }
            }
        }
        history.append(&events).await.unwrap();
        if day % 7 == 0 || day == 364 {
            let now = Timestamp((day as i64 + 1) * DAY_MS);
            history.roll_up(now).await.unwrap();
        }
    }
    let size = size(&history).await;
    let gib = size.bytes as f64 * (10_000 / PROFILES) as f64 / f64::from(1 << 30);
    println!("{size:?}: a year of 10,000 profiles is {gib:.3} GiB");
    let notes = replay(&history).await;
    let launches: u32 = notes.launches.iter().map(|l| l.2).sum();
    assert_eq!(
        u64::from(launches),
        365 * 20 * PROFILES,
        "no launch is lost"
    );
    assert!(gib < 1.0, "{gib} GiB");
}
