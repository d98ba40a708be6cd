//! Owns how gRPC messages are decoded: as prost does it, after a look at how many values they hold.
//!
//! The size of a message is bounded by tonic, but a value of two bytes can become one of hundreds in memory. Counting the
//! outermost values before decoding keeps the cost of a message within a small multiple of [`VALUES_MAX`] and its size.

use std::marker::PhantomData;

use prost::{
    Message,
    bytes::Buf,
    encoding::{DecodeContext, WireType, decode_key, skip_field},
};
use tonic::{
    Status,
    codec::{Codec, DecodeBuf, Decoder},
};
use tonic_prost::ProstEncoder;

/// Most outermost values of one message: resources of a response, names of a request.
pub const VALUES_MAX: usize = 1 << 18;

/// The codec of all our services.
#[derive(Clone, Debug)]
pub struct BoundedCodec<T, U>(PhantomData<(T, U)>);

impl<T, U> Default for BoundedCodec<T, U> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

impl<T, U> Codec for BoundedCodec<T, U>
where
    T: Message + Send + 'static,
    U: Message + Default + Send + 'static,
{
    type Decode = U;
    type Decoder = BoundedDecoder<U>;
    type Encode = T;
    type Encoder = ProstEncoder<T>;

    fn encoder(&mut self) -> Self::Encoder {
        ProstEncoder::default()
    }

    fn decoder(&mut self) -> Self::Decoder {
        BoundedDecoder(PhantomData)
    }
}

/// Decodes messages that hold at most [`VALUES_MAX`] values.
#[derive(Clone, Debug)]
pub struct BoundedDecoder<U>(PhantomData<U>);

impl<U: Message + Default> Decoder for BoundedDecoder<U> {
    type Error = Status;
    type Item = U;

    fn decode(&mut self, buf: &mut DecodeBuf<'_>) -> Result<Option<U>, Status> {
        // The whole message, without a copy.
        let bytes = buf.copy_to_bytes(buf.remaining());
        decode(bytes.as_ref()).map(Some)
    }
}

fn decode<U: Message + Default>(bytes: &[u8]) -> Result<U, Status> {
    let malformed = |error: prost::DecodeError| Status::invalid_argument(error.to_string());
    if !has_few_values(bytes).map_err(malformed)? {
        return Err(Status::resource_exhausted(format!("a message of more than {VALUES_MAX} values")));
    }
    U::decode(bytes).map_err(malformed)
}

/// Whether a message holds at most [`VALUES_MAX`] outermost values.
fn has_few_values(mut bytes: &[u8]) -> Result<bool, prost::DecodeError> {
    let mut count = 0;
    while !bytes.is_empty() {
        let (tag, wire_type): (u32, WireType) = decode_key(&mut bytes)?;
        skip_field(wire_type, tag, &mut bytes, DecodeContext::default())?;
        count += 1;
        if count > VALUES_MAX {
            return Ok(false);
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::discovery::DeltaDiscoveryResponse;

    /// Resources without any contents: two bytes each.
    fn empty_resources(count: usize) -> Vec<u8> {
        [0x12, 0x00].repeat(count)
    }

    #[test]
    fn a_message_of_very_many_values_is_refused_before_it_is_decoded() {
        let response: DeltaDiscoveryResponse = decode(&empty_resources(1000)).unwrap();
        assert_eq!(response.resources.len(), 1000);
        let status = decode::<DeltaDiscoveryResponse>(&empty_resources(VALUES_MAX + 1)).unwrap_err();
        assert_eq!(status.code(), tonic::Code::ResourceExhausted);
    }

    #[test]
    fn what_is_no_message_is_refused() {
        for bytes in [&[0x12, 0x05, 0x01][..], &[0xff; 12], &[0x00]] {
            let status = decode::<DeltaDiscoveryResponse>(bytes).unwrap_err();
            assert_eq!(status.code(), tonic::Code::InvalidArgument, "{bytes:?}");
        }
    }
}
