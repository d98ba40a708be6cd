//! What each service answers.

use hyper::body::Incoming;
use hyper::header::HeaderMap;
use hyper::{Method, Request, StatusCode};
use mesh_tests::bookinfo::VERSION_ATTRIBUTE;
use serde::{Deserialize, Serialize};

use crate::Kind;
use crate::fetch::{self, FetchError};
use crate::ratings::Ratings;

/// One service of one pod.
#[derive(Debug)]
pub(crate) struct Service {
    pub(crate) kind: Kind,
    pub(crate) pod: String,
}

/// An HTTP answer.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) content_type: &'static str,
    pub(crate) body: String,
}

/// The answer of the details service.
#[derive(Debug, Serialize, Deserialize)]
struct Details {
    id: u32,
    pod: String,
    author: String,
    year: u16,
    pages: u16,
    publisher: String,
}

/// The answer of the reviews service.
#[derive(Debug, Serialize, Deserialize)]
struct Reviews {
    id: u32,
    pod: String,
    version: String,
    reviews: Vec<Review>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Review {
    reviewer: String,
    text: String,
    rating: Option<Rating>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Rating {
    stars: u8,
    color: String,
}

/// Why a service cannot answer.
#[derive(Debug, thiserror::Error)]
enum Trouble {
    #[error(transparent)]
    Call(#[from] FetchError),
    #[error("{host}: unreadable answer")]
    Answer { host: &'static str, source: serde_json::Error },
}

impl Service {
    pub(crate) async fn answer(&self, request: &Request<Incoming>) -> Answer {
        if request.method() != Method::GET {
            return plain(StatusCode::METHOD_NOT_ALLOWED, "GET only\n".into());
        }
        let path = request.uri().path();
        if path == "/health" {
            return plain(StatusCode::OK, "healthy\n".into());
        }
        let mut steps = path.trim_matches('/').split('/');
        let (first, id) = (steps.next().unwrap_or(""), steps.next().unwrap_or("0").parse::<u32>());
        let Ok(id) = id else { return plain(StatusCode::BAD_REQUEST, "the id is a number\n".into()) };
        let headers = request.headers();
        match (self.kind, first) {
            (Kind::Productpage, "productpage" | "") => self.product_page(id, headers).await,
            (Kind::Details, "details") => json(&self.details(id)),
            (Kind::ReviewsV1 | Kind::ReviewsV2 | Kind::ReviewsV3, "reviews") => {
                self.reviews(id, headers).await
            }
            (Kind::Ratings, "ratings") => json(&Ratings { id, pod: self.pod.clone(), stars: [5, 4] }),
            _ => plain(StatusCode::NOT_FOUND, format!("no {path} here\n")),
        }
    }

    async fn product_page(&self, id: u32, headers: &HeaderMap) -> Answer {
        let fetched = tokio::try_join!(
            fetch_json::<Details>("details", format!("/details/{id}"), headers),
            fetch_json::<Reviews>("reviews", format!("/reviews/{id}"), headers),
        );
        match fetched {
            Ok((details, reviews)) => {
                let body = page(&self.pod, &details, &reviews);
                Answer { status: StatusCode::OK, content_type: "text/html; charset=utf-8", body }
            }
            Err(trouble) => bad_gateway(&trouble),
        }
    }

    fn details(&self, id: u32) -> Details {
        Details {
            id,
            pod: self.pod.clone(),
            author: "William Shakespeare".into(),
            year: 1595,
            pages: 200,
            publisher: "PublisherA".into(),
        }
    }

    async fn reviews(&self, id: u32, headers: &HeaderMap) -> Answer {
        let (version, color) = match self.kind {
            Kind::ReviewsV2 => ("v2", Some("black")),
            Kind::ReviewsV3 => ("v3", Some("red")),
            _ => ("v1", None),
        };
        let stars = match color {
            None => None,
            Some(color) => match fetch_json::<Ratings>("ratings", format!("/ratings/{id}"), headers).await {
                Ok(ratings) => Some((ratings.stars, color)),
                Err(trouble) => return bad_gateway(&trouble),
            },
        };
        let review = |number: usize, text: &str| Review {
            reviewer: format!("Reviewer{}", number + 1),
            text: text.to_owned(),
            rating: stars.map(|(stars, color)| Rating { stars: stars[number], color: color.to_owned() }),
        };
        json(&Reviews {
            id,
            pod: self.pod.clone(),
            version: version.to_owned(),
            reviews: vec![
                review(0, "An entertaining comedy of mistaken identities; the twins carry it."),
                review(1, "Funny, though the plot asks for patience before it pays off."),
            ],
        })
    }
}

async fn fetch_json<T: for<'de> Deserialize<'de>>(
    host: &'static str,
    path: String,
    headers: &HeaderMap,
) -> Result<T, Trouble> {
    let body = fetch::get(host, &path, headers).await?;
    serde_json::from_slice(&body).map_err(|source| Trouble::Answer { host, source })
}

fn page(pod: &str, details: &Details, reviews: &Reviews) -> String {
    let rows: String = reviews
        .reviews
        .iter()
        .map(|review| {
            let stars = review.rating.as_ref().map_or_else(String::new, |rating| {
                let stars = "★".repeat(usize::from(rating.stars));
                format!(" <span style=\"color:{}\">{stars}</span>", rating.color)
            });
            format!("<blockquote>{}<br>— {}{stars}</blockquote>\n", review.text, review.reviewer)
        })
        .collect();
    format!(
        "<!DOCTYPE html>\n<title>Simple Bookstore App</title>\n<h3>The Comedy of Errors</h3>\n\
         <h4>Book Details</h4>\n<dl data-details-pod=\"{}\"><dt>Author<dd>{}<dt>Year<dd>{}<dt>Pages<dd>{}\
         <dt>Publisher<dd>{}</dl>\n\
         <h4>Book Reviews</h4>\n<div data-reviews-pod=\"{}\" {VERSION_ATTRIBUTE}{}\">\n{rows}</div>\n\
         <footer>served by {pod}</footer>\n",
        details.pod,
        details.author,
        details.year,
        details.pages,
        details.publisher,
        reviews.pod,
        reviews.version,
    )
}

fn bad_gateway(trouble: &Trouble) -> Answer {
    let text = match trouble {
        Trouble::Call(error) => error.chain(),
        Trouble::Answer { source, .. } => format!("{trouble}: {source}"),
    };
    eprintln!("{text}");
    plain(StatusCode::BAD_GATEWAY, text + "\n")
}

fn plain(status: StatusCode, body: String) -> Answer {
    Answer { status, content_type: "text/plain; charset=utf-8", body }
}

fn json(value: &impl Serialize) -> Answer {
    match serde_json::to_string(value) {
        Ok(body) => Answer { status: StatusCode::OK, content_type: "application/json", body },
        Err(error) => plain(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
    }
}
