//! Controls that tell what an accuracy is worth: how far one gets without the image, or with another item's.
//!
//! What stands in for the image is decided here; asking the model is the recipe's. All of it must be computed over
//! the whole set of questions and not over one shard, so that shards agree.

use std::collections::BTreeMap;

use rand::Rng;
use rand::seq::SliceRandom;

use crate::error::{Error, Result};
use crate::rng;
pub use crate::stats::prior::{Choice, PriorSource};

/// Accuracy of uniform guessing: the mean of 1 / number of options; `None` for no items.
pub fn chance(num_options: &[usize]) -> Option<f64> {
    let sum: f64 = num_options.iter().map(|&options| 1.0 / options.max(1) as f64).sum();
    (!num_options.is_empty()).then(|| sum / num_options.len() as f64)
}

/// For each item the option whose text was most often right in its group of `train`; without `train` in the other
/// items of `items`, which the returned source says.
pub fn option_prior(train: Option<&[Choice<'_>]>, items: &[Choice<'_>]) -> (Vec<usize>, PriorSource) {
    crate::stats::prior::predict_all(train, items)
}

/// One item for [`shuffled_images`].
#[derive(Debug, Clone, Copy)]
pub struct ImageOf<'a> {
    /// The item's id: the pairing depends on ids and not on order.
    pub id: &'a str,
    /// What tells its image from others: the path.
    pub image: &'a str,
}

/// For each item the index of the item whose image it is shown instead: never one with the same image.
///
/// When no image belongs to more than half of the items the pairing is a permutation: each item's image is shown
/// exactly once. Otherwise items draw from those with another image. The same set of items and `seed` give the same
/// pairs in any order.
///
/// # Errors
/// [`Error::Data`] when all items have one and the same image.
pub fn shuffled_images(items: &[ImageOf<'_>], seed: u64) -> Result<Vec<usize>> {
    let mut groups: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
    for (index, item) in items.iter().enumerate() {
        groups.entry(item.image).or_default().push(index);
    }
    if groups.len() < 2 {
        return Err(Error::data(
            "images cannot be exchanged: all items have the same one\n   = help: take more questions, or leave this control out",
        ));
    }
    let mut stream = rng::stream(seed, "shuffled_images", &[]);
    let mut groups: Vec<Vec<usize>> = groups.into_values().collect();
    for group in &mut groups {
        group.sort_unstable_by_key(|&index| items[index].id);
        group.shuffle(&mut stream);
    }
    groups.shuffle(&mut stream);
    let largest = groups.iter().map(Vec::len).max().unwrap_or(0);
    let order: Vec<usize> = groups.concat();
    let mut shown = vec![0; items.len()];
    if 2 * largest <= items.len() {
        // Items of one image stand together, so a turn by the largest group leads every item out of its own.
        for (place, &index) in order.iter().enumerate() {
            shown[index] = order[(place + largest) % order.len()];
        }
    } else {
        for &index in &order {
            let others: Vec<usize> =
                order.iter().copied().filter(|&other| items[other].image != items[index].image).collect();
            shown[index] = others[stream.random_range(0..others.len())];
        }
    }
    Ok(shown)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn items<'a>(ids: &'a [String], images: &'a [String]) -> Vec<ImageOf<'a>> {
        ids.iter().zip(images).map(|(id, image)| ImageOf { id, image }).collect()
    }

    fn names(images: &[usize]) -> (Vec<String>, Vec<String>) {
        let ids = (0..images.len()).map(|n| format!("id{n:03}")).collect();
        (ids, images.iter().map(|n| format!("image{n}")).collect())
    }

    #[test]
    fn nobody_keeps_an_image_and_every_image_is_shown_once() {
        let many: Vec<usize> = (0..101).map(|n| n / 3).collect();
        for images in [vec![0, 1], vec![0, 0, 1, 1], vec![0, 1, 2, 2, 3, 3, 3], many] {
            let (ids, images) = names(&images);
            for seed in 0..20 {
                let shown = shuffled_images(&items(&ids, &images), seed).unwrap();
                assert!((0..images.len()).all(|n| images[shown[n]] != images[n]));
                let mut sorted = shown.clone();
                sorted.sort_unstable();
                assert!(sorted.into_iter().eq(0..images.len()));
            }
        }
    }

    #[test]
    fn order_changes_no_pair_and_the_seed_does() {
        let (ids, images) = names(&(0..40).map(|n| n / 2).collect::<Vec<_>>());
        let forward = shuffled_images(&items(&ids, &images), 3).unwrap();
        let reversed: Vec<ImageOf<'_>> = items(&ids, &images).into_iter().rev().collect();
        let backward = shuffled_images(&reversed, 3).unwrap();
        for n in 0..40 {
            assert_eq!(39 - backward[39 - n], forward[n]);
        }
        assert_ne!(forward, shuffled_images(&items(&ids, &images), 4).unwrap());
    }

    #[test]
    fn one_image_for_most_items_still_gives_every_item_another() {
        let (ids, images) = names(&[0, 0, 0, 0, 1]);
        let shown = shuffled_images(&items(&ids, &images), 1).unwrap();
        assert!((0..5).all(|n| images[shown[n]] != images[n]));
        let (ids, images) = names(&[0, 0]);
        assert!(shuffled_images(&items(&ids, &images), 1).is_err());
    }

    #[test]
    fn chance_is_the_mean_of_reciprocals() {
        assert_eq!(chance(&[2, 4, 4]), Some((0.5 + 0.25 + 0.25) / 3.0));
        assert_eq!(chance(&[]), None);
    }
}
